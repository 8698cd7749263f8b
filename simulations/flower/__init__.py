"""Flower's own ways here: its app folders on our grid, and our experiments in its simulation."""
