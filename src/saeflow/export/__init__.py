"""Dictionaries of an experiment in the formats of other tools: `saeflow.export.run.export`."""
