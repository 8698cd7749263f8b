"""The app of the hospitals."""
