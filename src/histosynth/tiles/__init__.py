"""Floor 1: tile sets; simulate, read, split by patient, make batches."""
