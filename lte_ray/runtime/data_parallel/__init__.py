"""Ordinary training in several processes by Ray Train: what runs in them, and the actor that starts them."""
