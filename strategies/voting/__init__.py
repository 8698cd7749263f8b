"""Rules that average nothing: the sites' models vote on each input, with certificates."""
