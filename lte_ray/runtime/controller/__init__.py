"""What runs in the driver: it starts, watches and replaces the processes of a run, and moves no tensors."""
