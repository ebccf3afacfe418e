"""Look-ups in embedding tables, their sum and its norm as one operation, with a body that runs and a form in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _sum(
    words: Tensor, ids: Tensor, positions: Tensor, places: Tensor | None, kinds: Tensor | None, segments: Tensor | None
) -> Tensor:  # fmt: skip
    found = F.embedding(ids, words)
    if kinds is not None and segments is not None:
        found = found + F.embedding(segments, kinds)
    if places is None:
        return found + positions[: ids.shape[1]]
    return found + F.embedding(places, positions)


@torch.library.custom_op("surgery::embed_layer_norm", mutates_args=())
def embed_layer_norm(
    words: Tensor, ids: Tensor, positions: Tensor, places: Tensor | None, kinds: Tensor | None, segments: Tensor | None, weight: Tensor,
    shift: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Layer norm of ``words[ids] + kinds[segments] + positions[places]``.

    ``words`` [vocabulary, width], ``positions`` [longest, width] and ``kinds`` [types, width] are tables, ``ids`` and ``segments``
    [batch, steps] and ``places`` [batch or 1, steps] their rows; without ``places`` step i has position i. Gives [batch, steps, width].
    """
    total = _sum(words, ids, positions, places, kinds, segments)
    return F.layer_norm(total, (words.shape[1],), weight, shift, eps)


@torch.library.custom_op("surgery::embed_layer_norm_sum", mutates_args=())
def embed_layer_norm_sum(
    words: Tensor, ids: Tensor, positions: Tensor, places: Tensor | None, kinds: Tensor | None, segments: Tensor | None, weight: Tensor,
    shift: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`embed_layer_norm` and the sum."""
    total = _sum(words, ids, positions, places, kinds, segments)
    return F.layer_norm(total, (words.shape[1],), weight, shift, eps), total


def _one(words: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    return words.new_empty(ids.shape[0], ids.shape[1], words.shape[1])


def _two(words: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _one(words, ids), _one(words, ids)


embed_layer_norm.register_fake(_one)
embed_layer_norm_sum.register_fake(_two)


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """EmbedLayerNormalization of com.microsoft, whose rows are of type int32. Its mask is not used."""
    from onnxscript import opset18 as op

    from surgery.backends.fuse.contrib import operator

    inputs = ["input_ids:M", "segment_ids:M?", "words", "positions", "kinds?", "gamma", "beta", "mask:M?", "position_ids:M?"]
    plain = operator("EmbedLayerNormalization", inputs, ["output", "mask_index:M?"], {"epsilon": "float"})
    growing = operator("EmbedLayerNormalization", inputs, ["output", "mask_index:M?", "embedding_sum?"], {"epsilon": "float"})

    def rows(ids):  # type: ignore[no-untyped-def]
        return None if ids is None else op.Cast(ids, to=6)  # TensorProto.INT32

    def alone(words, ids, positions, places, kinds, segments, weight, shift, eps: float):  # type: ignore[no-untyped-def]
        made = plain(rows(ids), rows(segments), words, positions, kinds, weight, shift, None, rows(places), epsilon=eps)
        return made[0]  # the kernel wants the second output, the lengths of a mask that is not there, to have a name

    def with_sum(words, ids, positions, places, kinds, segments, weight, shift, eps: float):  # type: ignore[no-untyped-def]
        made = growing(rows(ids), rows(segments), words, positions, kinds, weight, shift, None, rows(places), epsilon=eps)
        made[1].name = ""  # an optional output that nobody wants has no name
        return made[0], made[2]

    return {torch.ops.surgery.embed_layer_norm.default: alone, torch.ops.surgery.embed_layer_norm_sum.default: with_sum}
