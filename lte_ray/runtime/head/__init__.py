"""What runs in the process of a head or of several: the actor, its client of the coordinator, and checkpoints."""
