"""The name of the journal's database, and the version of its tables."""

DATABASE = "journal.sqlite"
VERSION = 5
