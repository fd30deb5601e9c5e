"""Measurements against stated limits, run by `make bench`. Every figure in the README comes from here."""
