"""Rules that withstand hostile sites."""
