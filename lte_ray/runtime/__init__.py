"""The engine on Ray: actors that are thin shells, their placement, and how tensors travel."""
