"""Floor 0: types, registry, run folders, checkpoints, device, progress, errors. Imports nothing of ours."""
