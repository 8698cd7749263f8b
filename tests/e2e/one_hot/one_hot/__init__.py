"""An app whose final model proves that every reply was counted exactly once."""
