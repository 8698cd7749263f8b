"""Rules for clients that take part unevenly."""
