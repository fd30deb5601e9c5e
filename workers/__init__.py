"""Ready-made workers: programs that LoRA heads run. Copy one to start your own."""
