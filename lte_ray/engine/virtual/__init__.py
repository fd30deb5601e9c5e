"""A run under a virtual clock: the engine's heads and coordinator, or heads that only keep time.

`run.Simulation` is the loop; `entry` starts it for a worker or for shapes alone; `record` is what it gives.
"""
