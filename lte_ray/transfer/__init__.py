"""The wire format of contributions: groups of entries that travel together, their encoding, and checksums."""
