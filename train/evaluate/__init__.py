"""How good are samples: settings and baselines, features, metrics, figures. The command is ``python -m train.evaluate``."""
