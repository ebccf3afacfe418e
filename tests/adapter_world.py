"""A folder with a few stored base models, for tests of adapters that peft trained on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import fixtures
from tests.caching import capture_cache


@contextmanager
def stored_bases(
    factory: pytest.TempPathFactory, name: str, make: Callable[[], dict[str, nn.Module]], live: dict[str, nn.Module]
) -> Iterator[Path]:
    """The working directory ``name`` with each model that ``make`` gives in a folder of its own; ``live`` holds them, in evaluation."""
    folder = factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        patch.setenv("SURGERY_CACHE", str(capture_cache(factory)))
        torch.manual_seed(0)
        for path, model in make().items():
            fixtures.save(model, folder / path)
            live[path] = model.eval()
        warnings.simplefilter("ignore")
        yield folder


def trained_a_little(model: nn.Module, by: float) -> None:
    """Moves everything that trains by seeded numbers of about this size."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape))
