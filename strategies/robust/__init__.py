"""Rules that withstand hostile clients."""
