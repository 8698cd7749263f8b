"""Rules that merge models: of different tasks, of different starts, or picked from many."""
