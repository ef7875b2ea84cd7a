"""Floor 3: the diagnostic classifier, its calibration and its scores."""
