"""Language models: their folders, opening and running them, and their MLPs as functions."""
