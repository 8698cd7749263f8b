"""An app that tries what a site must forbid."""
