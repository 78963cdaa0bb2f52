"""Checkpoints: the format, its integration with transformers, writing, reading, and the way back to dense."""
