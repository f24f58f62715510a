"""The products of a step along a sparse pattern, on CPU and GPU."""
