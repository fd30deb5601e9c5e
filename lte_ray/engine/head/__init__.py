"""What a head is, without Ray: its training, its state, and several heads in one process."""
