"""Rules for sites that take part unevenly."""
