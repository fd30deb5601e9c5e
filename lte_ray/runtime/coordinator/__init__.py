"""What runs in the coordinator's process, and in the processes of its shards."""
