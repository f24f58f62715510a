"""From a configuration to the jobs that are left to do: sweep, stages, instances and their keys, batches, reasons."""
