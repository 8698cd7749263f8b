"""Rules that merge models: of different tasks, of different initial models, or selected from many."""
