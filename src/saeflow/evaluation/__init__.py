"""How sparse dictionaries are, and how faithful to the model, on held-out tokens."""
