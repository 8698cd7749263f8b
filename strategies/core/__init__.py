"""Code that all rules share: base classes, replies, models as flat vectors, sums, distances, storage of memory."""
