"""Simulate a federation on one machine: in-process grids, participation processes, data and experiments."""

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.participation import Always, Bernoulli, Cyclic, Markov, Participation, Trace
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import read
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.results.python import Results, run

__all__ = [
    "Always",
    "Bernoulli",
    "Cyclic",
    "Examples",
    "Experiment",
    "LocalGrid",
    "Markov",
    "Participation",
    "Results",
    "Source",
    "Trace",
    "read",
    "run",
    "with_availability",
]
