"""Rules that weigh sites of unequal worth."""
