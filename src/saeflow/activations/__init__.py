"""Activations on disk: a column a hook, filled by one forward pass and read in shuffled batches."""
