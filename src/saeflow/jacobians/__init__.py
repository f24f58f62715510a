"""The Jacobians of pairs of dictionaries around an MLP, and of transcoders."""
