"""Training data: what a dataset is, and each kind of it."""
