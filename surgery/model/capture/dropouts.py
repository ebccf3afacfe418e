"""Modules that are dropout under a name and with code of their own, such as an autograd function that saves memory.

A trace cannot switch off what they draw. They are known by what they do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from surgery.model.capture.stacks import drop_path_rate

_ROWS = 64


def is_dropout(module: nn.Module) -> bool:
    """Whether a module without tensors and parts does nothing in evaluation, and in training zeroes about its rate of all elements, each by
    itself, and divides the others by what is left (Srivastava et al. 2014)."""
    rate = drop_path_rate(module)
    if rate is None or not 0 < rate < 1 or module._parameters or module._buffers or module._modules:
        return False
    training, given = module.training, torch.arange(1.0, _ROWS**2 + 1).view(_ROWS, _ROWS)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            idle, out = module.eval()(given.clone()), module.train()(given.clone())
    except Exception:  # whatever code of others raises on a plain matrix
        return False
    finally:
        module.train(training)
    if not isinstance(out, torch.Tensor) or out.shape != given.shape or not torch.equal(idle, given):
        return False
    dropped = out == 0
    kept = torch.allclose(out[~dropped], given[~dropped] / (1 - rate))
    # far from what whole rows or columns that go together, or another rate, would give
    shares = [float((dropped.float().mean(axis) - rate).abs().max()) for axis in (0, 1)]
    return kept and max(shares) < 5 * (rate * (1 - rate) / _ROWS) ** 0.5


def make_plain(module: nn.Module) -> None:
    """Lets such a module compute torch's own dropout, at its rate."""
    rate = drop_path_rate(module) or 0.0
    module.__dict__["forward"] = lambda x: F.dropout(x, rate, module.training)
