"""Seeded random weights for ``config:`` references: one expression a parameter, the same on every machine and thread count."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from surgery.model.weights import Expr, Init, is_float


def seed_of(name: str, seed: int = 0) -> int:
    """A 63-bit seed from a parameter's name and the model's seed (sha256), so that no order of creation matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def init_std(config: Mapping[str, Any]) -> float:
    """Standard deviation of weight matrices: the config's ``initializer_range`` (or the family's word for it), else 0.02."""
    for key in ("initializer_range", "init_std", "initializer_factor"):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
            return float(value)
    return 0.02


def initial(name: str, shape: tuple[int, ...], dtype: str, config: Mapping[str, Any], seed: int = 0) -> Expr:
    """Start value of a parameter or buffer by its kind.

    Biases and running means are zero, weights of norms and running variances one, position ids count up, matrices and
    convolutions are normal with :func:`init_std`; a vector that is neither bias nor norm is normal too.
    """
    leaf = name.rpartition(".")[2]
    owner = name.rpartition(".")[0].rpartition(".")[2].lower()
    if not is_float(dtype):
        if leaf.endswith("_ids") and leaf != "token_type_ids" and shape and shape[-1] > 1:
            return Init(shape, dtype, "arange")
        return Init(shape, dtype, "zeros")
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1 and _is_norm(owner)) or leaf == "gamma":
        return Init(shape, dtype, "ones")
    if leaf == "running_mean" or leaf == "beta" or leaf.endswith("bias") or "bias" in leaf.split("_"):
        return Init(shape, dtype, "zeros")
    if leaf == "weight" and len(shape) == 1:
        return Init(shape, dtype, "ones")
    return Init(shape, dtype, "normal", (0.0, init_std(config)), seed_of(name, seed))


def _is_norm(owner: str) -> bool:
    return "norm" in owner or owner.startswith("ln") or owner.startswith("bn")
