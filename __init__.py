"""Federated learning on Flower: pluggable aggregation rules, a server that keeps bad replies out, a fast simulator."""

__version__ = "0.1.0"
