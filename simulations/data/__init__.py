"""The clients of a simulation: their examples, their availability per round, and attacks by hostile clients."""
