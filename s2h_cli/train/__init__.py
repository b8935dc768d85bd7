"""The training engine: knows nothing of a method."""
