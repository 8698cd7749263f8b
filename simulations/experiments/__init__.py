"""What is run: settings, TOML files, the shipped ones, and an experiment resolved once."""
