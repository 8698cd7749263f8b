"""Grids that run simulated clients, in this process or in Flower's simulation, and simulate their availability."""
