"""What all rules share: the kinds of rule, replies, models as vectors, sums, distances, memory at rest."""
