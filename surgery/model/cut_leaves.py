"""Module attributes that state sizes: what an ``nn`` leaf must say of itself after its tensors were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.model.capture.leaves import Attention
from surgery.model.dims import Change

_CONV, _CONV_T = nn.modules.conv._ConvNd, nn.modules.conv._ConvTransposeNd
_BATCH = nn.modules.batchnorm._NormBase


def apply_changes(module: nn.Module, changes: Sequence[Change]) -> bool:
    """Constants of the operation that a leaf runs, written to the leaf's attributes; False when one has no place there."""
    for change in changes:
        place, at, *deeper = change.path
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and (place, at) == ("args", 1):
            shape = list(module.normalized_shape)
            shape[deeper[0]] = change.value
            module.normalized_shape = tuple(shape)
        elif isinstance(module, nn.GroupNorm) and (place, at) == ("args", 1):
            module.num_groups = change.value
        elif isinstance(module, _CONV) and (place, at) == ("args", 6):
            module.groups = change.value
        elif isinstance(module, Attention) and change.kind == "scale":
            module.scale = change.value
        else:
            return False
    return True


def refit(module: nn.Module) -> None:
    """Sizes that follow from the leaf's own tensors. (A leaf without any is no module of a captured program.)"""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, _CONV):
        first, second = weight.shape[:2]
        if isinstance(module, _CONV_T):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, _BATCH):
        known = weight if weight is not None else module.running_mean
        module.num_features = module.num_features if known is None else known.shape[0]
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.shape[0]
