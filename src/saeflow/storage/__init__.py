"""Files that are what they say: published whole, verified when they are read, made by one process at a time."""
