"""What a model predicts: losses, metrics, and their sums over batches."""
