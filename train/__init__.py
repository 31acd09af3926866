"""Training of GMFlow checkpoints: ``python -m train --preset digits``."""
