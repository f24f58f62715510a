"""The style of all figures, their axes and legends, and how they are saved."""
