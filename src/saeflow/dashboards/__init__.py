"""Static pages of a dictionary and its latents, and of dictionaries beside each other: no server, no network."""
