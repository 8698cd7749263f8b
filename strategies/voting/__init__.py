"""Rules that let the clients' models vote on each input, and certify how many hostile clients a result withstands."""
