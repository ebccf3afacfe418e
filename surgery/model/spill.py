"""Tensors that were computed once and are needed until emission, kept in files that the system may drop from memory."""

from __future__ import annotations

import os
import tempfile

import torch

from surgery.model.realise import held
from surgery.model.weights import Held

SMALL = 1 << 20
"""Up to so many bytes a tensor stays in memory."""


def spilled(tensor: torch.Tensor) -> Held:
    """An expression for a tensor as :func:`~surgery.model.realise.held` gives it, with its bytes in an unnamed temporary file.

    The file is mapped, so pages are read when they are used and can be dropped at any time; it is gone when the tensor is. Where no
    temporary file can be written the tensor stays in memory.
    """
    kept = held(tensor)
    value = kept.tensor
    if value.numel() * value.element_size() <= SMALL:
        return kept
    try:
        descriptor, path = tempfile.mkstemp(prefix="surgery-")
    except OSError:
        return kept
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        stored = torch.from_file(path, shared=False, size=value.numel() * value.element_size(), dtype=torch.uint8)
    except OSError:
        return kept
    finally:
        os.unlink(path)
    return Held(kept.shape, kept.dtype, kept.digest, stored.view(value.dtype).view(value.shape))
