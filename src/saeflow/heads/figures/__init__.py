"""Figures of the heads stage, a row of panels for each layer: of what heads write, and of latents over heads."""
