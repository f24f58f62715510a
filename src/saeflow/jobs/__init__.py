"""What surrounds a job's work: options, log, atomic folders, provenance."""
