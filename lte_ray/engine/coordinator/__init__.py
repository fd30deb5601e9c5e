"""The merging side of a run without Ray: decisions, tensors, and what follows from them."""
