"""Experiments: their settings, TOML files, shipped files, models, and the data and clients that their runs share."""
