"""Run experiments and write their results: journals, tables, plots, reports, and the claims of papers."""
