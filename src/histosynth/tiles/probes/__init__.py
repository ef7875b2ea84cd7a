"""What could be learnt without looking at tissue: leakage probes, and what colour says of the classes."""
