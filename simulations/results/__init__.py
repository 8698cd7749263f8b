"""Runs, and what they leave: journals, tables, pictures, reports, what papers claim."""
