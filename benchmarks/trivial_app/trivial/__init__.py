"""The Flower app of `grid_overhead.py`."""
