"""Training sparse dictionaries from stored activations."""
