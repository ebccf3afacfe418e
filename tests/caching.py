"""The folder of captures that the tests of a run share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def capture_cache(factory: pytest.TempPathFactory) -> Path:
    """Where captures are kept for the whole run, of all its workers: entries appear whole, and none depends on who made it."""
    base = factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "capture-cache"
