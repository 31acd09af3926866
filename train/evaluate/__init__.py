"""How good are samples: settings and baselines, features, metrics, figures. ``python -m train.evaluate``."""
