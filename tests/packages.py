"""Optional packages that a test may need."""

from importlib import import_module

import pytest


def importable(module: str, name: str):
    """A name of a module; the test is skipped where it cannot be imported,
    be it for a torchvision that does not fit torch."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{module}.{name}: {str(error).strip().splitlines()[-1]}")
