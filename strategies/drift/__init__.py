"""Rules for clients that drift apart during their local steps; each has an algorithm at the clients."""
