"""What the anatomy needs to know about operations: their short names and a few classes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_NAMES: dict[int, tuple[str, Any]] = {}
"""Names by the identity of the operation, which stays because it is kept here: torch's operations are hashed in Python, and this is asked for often."""


def name_of(node: fx.Node) -> str:
    """Short name without namespace and overload: ``linear``; ``module`` for opaque modules, the node's op for the rest."""
    if node.op != "call_function":
        return "module" if node.op == "call_module" else node.op
    target = node.target
    known = _NAMES.get(id(target))
    if known is not None:
        return known[0]
    schema = getattr(target, "_schema", None)
    name: str = schema.name.rsplit("::", 1)[-1] if schema is not None else getattr(target, "__name__", str(target))
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    _NAMES[id(target)] = name, target
    return name


def is_pointwise(node: fx.Node) -> bool:
    """Elementwise in its tensor arguments (with broadcasting)."""
    name = name_of(node)
    if name in POINTWISE:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and name not in NOT_POINTWISE


SHAPE = frozenset(
    """view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT mH matrix_H adjoint swapaxes swapdims movedim
    unsqueeze squeeze expand expand_as broadcast_to contiguous clone alias detach to _to_copy type_as dropout dropout_ native_dropout
    lift_fresh_copy lift_fresh view_as reshape_as flip float half bfloat16 requires_grad_ feature_dropout view_as_complex view_as_real
    feature_alpha_dropout alpha_dropout""".split()
)
"""Ops of one input that move values without mixing them."""

TURNS = frozenset("transpose permute t numpy_T mT mH matrix_H adjoint swapaxes swapdims movedim".split())
DROPOUT = frozenset("dropout native_dropout feature_dropout feature_alpha_dropout alpha_dropout".split())
PARTS = frozenset("slice select narrow split split_with_sizes chunk unbind getitem tensor_split unsafe_split unsafe_chunk".split())
"""Ops that take a part of one input."""

GATHER = frozenset("index index_select gather roll take_along_dim repeat_interleave repeat constant_pad_nd pad masked_scatter".split())

POINTWISE = frozenset(
    """add sub mul div neg pow exp log sqrt rsqrt relu relu6 gelu silu mish sigmoid tanh hardswish hardtanh hardsigmoid elu selu celu
    leaky_relu softplus clamp clamp_min clamp_max where maximum minimum abs square reciprocal rsub masked_fill erf nan_to_num threshold
    prelu __and__ __or__ bitwise_and logical_and floor_divide softsign logsigmoid glu""".split()
)
NOT_POINTWISE = frozenset({"dropout", "native_dropout", "to", "_to_copy", "clone", "contiguous"})

ACTIVATIONS = {
    "gelu": "gelu", "silu": "silu", "relu": "relu", "relu6": "relu6", "mish": "mish", "hardswish": "hardswish", "elu": "elu",
    "selu": "selu", "celu": "celu", "leaky_relu": "leaky_relu", "softplus": "softplus", "tanh": "tanh", "sigmoid": "sigmoid",
    "hardtanh": "hardtanh", "hardsigmoid": "hardsigmoid", "glu": "glu", "softsign": "softsign", "prelu": "prelu", "erf": "erf",
}  # fmt: skip

NORMS = {
    "layer_norm": "layer", "native_layer_norm": "layer", "rms_norm": "rms", "_fused_rms_norm": "rms",
    "batch_norm": "batch", "_native_batch_norm_legit_no_training": "batch", "_native_batch_norm_legit": "batch",
    "native_batch_norm": "batch", "cudnn_batch_norm": "batch", "group_norm": "group", "native_group_norm": "group",
    "instance_norm": "instance",
}  # fmt: skip

MATMUL = frozenset({"matmul", "mm", "bmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
CONV = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
SCANS = frozenset({"recurrence", "running_maximum", "cumsum", "cumprod", "cummax", "logcumsumexp"})
COMPARE = frozenset({"le", "lt", "ge", "gt", "tril", "triu", "triu_indices", "tril_indices"})
SIZES = frozenset({"sym_size", "sym_numel", "size"})


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor-valued inputs, in order (integers left out)."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def is_tensor(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return spec is None or isinstance(spec, tuple) or spec.kind == "tensor"


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The size expressions of a tensor value; None when unknown or when there are several values."""
    spec = node.meta.get("spec")
    return None if spec is None or isinstance(spec, (tuple, list)) or spec.kind != "tensor" else spec.shape


def is_activation(node: fx.Node) -> bool:
    """A floating-point tensor value that is not a parameter or buffer."""
    spec = node.meta.get("spec")
    if node.op == "get_attr" or spec is None or isinstance(spec, (tuple, list)):
        return False
    return spec.kind == "tensor" and spec.dtype.startswith(("float", "bfloat", "complex"))
