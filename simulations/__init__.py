"""A federation on one machine: a grid in process, participation, data, experiments and their reports."""

from corymb.simulations.grid import LocalGrid

__all__ = ["LocalGrid"]
