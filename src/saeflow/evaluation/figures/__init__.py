"""Figures of how sparse dictionaries are and how faithful to the model, alone and several layers at once."""
