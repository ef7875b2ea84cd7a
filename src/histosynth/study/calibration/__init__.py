"""From a CSV of predictions to calibrators, conformal sets and a page about them."""
