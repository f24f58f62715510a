"""What all figures share: style, axes, legends, saving, the registry that finds them, and the job that draws them."""
