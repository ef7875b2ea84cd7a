"""Floor 6: a face for browsers. It shows what is on disk and holds no logic."""
