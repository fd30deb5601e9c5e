"""The command line: ``lte-ray train WORKER [flags]``."""
