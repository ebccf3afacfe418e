"""The normal form of traced operations: views as reshapes, no-ops gone, baked sizes open, training ops as modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from surgery.model.capture import leaves
from surgery.model.capture.markers import DROP_PATH, ENTER, EXIT
from surgery.model.capture.stacks import drop_path_rate
from surgery.model.program import ValueSpec

aten = torch.ops.aten

_SYNONYMS: dict[Any, Any] = {
    getattr(getattr(aten, name), kind): getattr(getattr(aten, usual), kind)
    for name, usual, kinds in (
        ("multiply", "mul", "Tensor Scalar"), ("divide", "div", "Tensor Scalar Tensor_mode"), ("subtract", "sub", "Tensor Scalar"),
        ("true_divide", "div", "Tensor Scalar"), ("negative", "neg", "default"), ("absolute", "abs", "default"), ("clip", "clamp", "default Tensor"),
        ("greater", "gt", "Tensor Scalar"), ("greater_equal", "ge", "Tensor Scalar"), ("less", "lt", "Tensor Scalar"),
        ("less_equal", "le", "Tensor Scalar"), ("not_equal", "ne", "Tensor Scalar"), ("concatenate", "cat", "default"),
    )
    for kind in kinds.split()
}  # fmt: skip
"""Second names of operations and the usual ones."""


@dataclass(frozen=True)
class Leaf:
    """A module that replaces a node. ``tensors`` maps its attribute names to full tensor names; ``arguments`` build it."""

    path: str
    cls: type[nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


class Normaliser:
    """Rewrites one flat graph in place. ``owners`` maps placeholder names to all full names of the tensor they stand for."""

    def __init__(self, model: nn.Module, owners: dict[str, list[str]]) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owners = owners
        self._fresh: dict[str, int] = {}
        self._outside: dict[str, int] = self._fresh

    def run(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is ENTER:  # each call of a layer names its own additions from the start, so that calls compare equal
                self._fresh = {}
            elif node.target is EXIT:
                self._fresh = self._outside
            if self._noop(graph, node):
                continue
            self._views(graph, node)
            leaf = self._leaf(node) or self._jitter(graph, node)
            if leaf is not None:
                self._become(graph, node, *leaf)

    # -- plain rewrites

    def _noop(self, graph: fx.Graph, node: fx.Node) -> bool:
        """Removes operations that return their input: same-dtype casts, whole slices, aliases."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        mine, its = node.meta.get("spec"), source.meta.get("spec")
        name = str(node.target)
        gone = name in ("aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default")
        if name.startswith("aten.to.") and mine == its:
            formats = [
                v for v in (*node.args[1:], *node.kwargs.values()) if isinstance(v, torch.memory_format) and v is not torch.preserve_format
            ]
            gone = not formats and node.kwargs.get("copy") is not True and True not in node.args[1:]
        elif name == "aten.slice.Tensor":
            given = [*node.args, *(None, 0, None, sys.maxsize, 1)[len(node.args) :]]
            start, end, step = given[2:5]
            gone = start in (None, 0) and end in (None, sys.maxsize) and step == 1
        elif name == "aten.expand.default":
            gone = mine == its
        if name == "aten.detach.default" and isinstance(mine, ValueSpec) and not mine.dtype.startswith(("float", "bfloat")):
            gone = True
        if gone and not (_changed_later(node) or _changed_later(source)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            return True
        return False

    def _views(self, graph: fx.Graph, node: fx.Node) -> None:
        node.target = _SYNONYMS.get(node.target, node.target)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        if node.target is aten.reshape.default:
            node.args = (node.args[0], _open_reshape(node), *node.args[2:])
        elif node.target is aten.expand.default:
            node.args = (node.args[0], _open_expand(node), *node.args[2:])
        elif node.target is aten.histc.default:
            _float_histogram(graph, node)

    # -- leaves

    def _full(self, value: Any) -> list[str]:
        return self.owners.get(value.name, []) if isinstance(value, fx.Node) and value.op == "placeholder" else []

    def _own_module(
        self, node: fx.Node, weight: Any, bias: Any, cls: type[nn.Module] | tuple[type[nn.Module], ...]
    ) -> tuple[str, dict[str, str]] | None:
        """The module at whose path these very tensors are ``weight`` and ``bias``, the innermost of the call if possible."""
        paths = [name.removesuffix(".weight") for name in self._full(weight) if name.endswith(".weight")]
        here = self.scope(node)
        for path in sorted(paths, key=lambda p: (p != here, p)):
            if not isinstance(self.modules.get(path), cls):
                continue
            if bias is None:
                if getattr(self.modules[path], "bias", None) is None:
                    return path, {"weight": f"{path}.weight"}
            elif f"{path}.bias" in self._full(bias):
                return path, {"weight": f"{path}.weight", "bias": f"{path}.bias"}
        return None

    @staticmethod
    def scope(node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and isinstance(entry[0], str)]
        if not paths or _from_root(paths[-1]):
            return _clean(paths[-1]) if paths else ""
        # where modules stand in several places (an activation that all layers share) the tracer tells paths inside a layer from the layer on
        owner = _clean(next((p for p in reversed(paths) if _from_root(p)), "model"))
        return f"{owner}.{paths[-1].partition('@')[0]}".lstrip(".")

    def _leaf(self, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
        build = _BUILDERS.get(str(node.target))
        return None if build is None else build(self, node)

    def _jitter(self, graph: fx.Graph, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
        """``x * uniform(like x)``, in place or not: the noise that routers get in training, and in training only."""
        if node.target not in (aten.mul.Tensor, aten.mul_.Tensor):
            return None
        x, draw = node.args[:2]
        if not isinstance(draw, fx.Node) or draw.target is not aten.uniform_.default or not isinstance(x, fx.Node):
            return None
        like = draw.args[0]
        if not isinstance(like, fx.Node) or like.target is not aten.empty_like.default or like.args[0] is not x:
            return None
        readers = set(x.users) - {like, node}
        if set(draw.users) != {node} or set(like.users) != {draw} or (node.target is aten.mul_.Tensor and readers):
            return None  # whoever else reads `x` reads what was changed in place
        node.target, node.args = aten.mul.Tensor, (x, 1.0)
        graph.erase_node(draw)
        graph.erase_node(like)
        low, high = (_argument(draw, name) for name in ("from", "to"))
        return Leaf(self.fresh(self.scope(node), "jitter"), leaves.Jitter, {"low": low, "high": high}), (x,)

    def _become(self, graph: fx.Graph, node: fx.Node, leaf: Leaf, args: tuple[Any, ...]) -> None:
        if node.target is aten.batch_norm.default:
            self._drop_counter(graph, leaf)
        node.meta["leaf"] = (leaf, args)

    def _drop_counter(self, graph: fx.Graph, leaf: Leaf) -> None:
        """The module counts its batches itself."""
        counter = f"{leaf.path}.num_batches_tracked"
        for node in reversed(list(graph.nodes)):
            if (
                node.op == "call_function"
                and str(node.target) == "aten.add_.Tensor"
                and counter in self._full(node.args[0])
                and not node.users
            ):
                graph.erase_node(node)
                return

    def fresh(self, scope: str, name: str) -> str:
        """A path for a module that the model has as a function: beside what calls it."""
        while True:
            path = f"{scope}.{name}" if scope else name
            count = self._fresh.get(path, 0)
            self._fresh[path] = count + 1
            path = f"{path}_{count}" if count else path
            if path not in self.modules and not self._taken(path):
                return path

    def _taken(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        module = self.modules.get(owner)
        return module is not None and (name in module._parameters or name in module._buffers)


def draws(graph: fx.Graph) -> dict[str, str]:
    """Operations that draw random numbers and that no leaf stands for, with the module path of the first of each."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if seeded and "leaf" not in node.meta and str(node.target) not in _BUILDERS:
            found.setdefault(str(node.target), Normaliser.scope(node))
    return found


def _from_root(path: str) -> bool:
    """Whether a path begins at the wrapper, whose one child is called ``model``."""
    return path.partition("@")[0] in ("", "model") or path.startswith(("model.", "L['self']"))


def _clean(path: str) -> str:
    """The module path as the model has it: without the wrapper's own name and the tracer's call counters."""
    path = path.partition("@")[0]
    if path.startswith("L['self']"):
        path = path.removeprefix("L['self']").lstrip(".")
    return path.removeprefix("model.") if path != "model" else ""


def _changed_later(node: fx.Node) -> bool:
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if user.op == "call_function" and schema is not None and schema.is_mutable:
            return True
    return False


def _open_expand(node: fx.Node) -> list[Any]:
    """Sizes that expand leaves as they are become -1."""
    source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    have = source.meta["spec"].shape  # type: ignore[union-attr]
    want = node.meta["spec"].shape
    lead = len(want) - len(have)
    return [-1 if i >= lead and have[i - lead] == want[i] else size for i, size in enumerate(sizes)]


def _float_histogram(graph: fx.Graph, node: fx.Node) -> None:
    """Counts on integers exist on accelerators only, so models choose the type by device; floating counts exist everywhere."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not source.meta["spec"].dtype.startswith("int"):
        return
    with graph.inserting_before(node):
        cast = graph.call_function(aten.to.dtype, (source, torch.float32))
    cast.meta = {**source.meta, "spec": replace(source.meta["spec"], dtype="float32")}
    cast.meta.pop("val", None)
    node.args = (cast, *node.args[1:])
    node.meta["spec"] = replace(node.meta["spec"], dtype="float32")


def _open_reshape(node: fx.Node) -> list[Any]:
    """Where no size is -1, the first fixed size that is not the last becomes -1 (head counts), else the last one.

    Sound because the size is implied by the others; a fixed 1 says something about structure and stays.
    """
    sizes = list(node.args[1])  # type: ignore[arg-type]
    if any(isinstance(n, int) and n <= 0 for n in sizes):
        return sizes
    fixed = [i for i, n in enumerate(sizes) if isinstance(n, int) and n > 1]
    if not fixed or all(isinstance(n, int) for n in sizes):
        return sizes
    at = next((i for i in fixed if i != len(sizes) - 1), fixed[-1])
    sizes[at] = -1
    return sizes


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]
    for i, argument in enumerate(schema.arguments):
        if argument.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
    return default


def _linear(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight, bias = _argument(node, "weight"), _argument(node, "bias")
    own = n._own_module(node, weight, bias, nn.Linear)
    if own is None:
        return None
    rows, columns = weight.meta["spec"].shape
    return Leaf(own[0], nn.Linear, {"in_features": columns, "out_features": rows, "bias": bias is not None}, own[1]), (node.args[0],)


def _embedding(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight, padding = _argument(node, "weight"), _argument(node, "padding_idx")
    own = n._own_module(node, weight, None, nn.Embedding)
    if own is None or _argument(node, "scale_grad_by_freq") or _argument(node, "sparse"):
        return None
    rows, width = weight.meta["spec"].shape
    arguments = {"num_embeddings": rows, "embedding_dim": width, "padding_idx": None if padding in (-1, None) else padding}
    return Leaf(own[0], nn.Embedding, arguments, own[1]), (_argument(node, "indices"),)


def _layer_norm(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight, bias = _argument(node, "weight"), _argument(node, "bias")
    own = n._own_module(node, weight, bias, nn.LayerNorm) if weight is not None else None
    if own is None:
        return None
    arguments = {"normalized_shape": list(_argument(node, "normalized_shape")), "eps": _argument(node, "eps"), "bias": bias is not None}
    return Leaf(own[0], nn.LayerNorm, arguments, own[1]), (node.args[0],)


def _rms_norm(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight = _argument(node, "weight")
    own = n._own_module(node, weight, None, nn.RMSNorm) if weight is not None else None
    if own is None:
        return None
    arguments = {"normalized_shape": list(_argument(node, "normalized_shape")), "eps": _argument(node, "eps")}
    return Leaf(own[0], nn.RMSNorm, arguments, own[1]), (node.args[0],)


def _group_norm(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight, bias = _argument(node, "weight"), _argument(node, "bias")
    own = n._own_module(node, weight, bias, nn.GroupNorm) if weight is not None and bias is not None else None
    if own is None:
        return None
    arguments = {"num_groups": _argument(node, "num_groups"), "num_channels": weight.meta["spec"].shape[0], "eps": _argument(node, "eps")}
    return Leaf(own[0], nn.GroupNorm, arguments, own[1]), (node.args[0],)


def _convolution(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    weight, bias = _argument(node, "weight"), _argument(node, "bias")
    cls: type[nn.Module] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[str(node.target).split(".")[1]]
    own = n._own_module(node, weight, bias, cls)
    if own is None:
        return None
    shape, groups = weight.meta["spec"].shape, _argument(node, "groups")
    padding = _argument(node, "padding")

    def per_axis(value: Any) -> Any:
        return value if isinstance(value, str) else (list(value) * (len(shape) - 2) if len(value) == 1 else list(value))

    arguments = {
        "in_channels": shape[1] * groups, "out_channels": shape[0], "kernel_size": list(shape[2:]), "stride": per_axis(_argument(node, "stride")),
        "padding": per_axis(padding), "dilation": per_axis(_argument(node, "dilation")), "groups": groups, "bias": bias is not None,
    }  # fmt: skip
    return Leaf(own[0], cls, arguments, own[1]), (node.args[0],)


def _batch_norm(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    mean = _argument(node, "running_mean")
    for name in n._full(mean):
        path = name.removesuffix(".running_mean")
        module = n.modules.get(path)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and not isinstance(module, nn.SyncBatchNorm):
            cls = next(c for c in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(module, c))
            arguments = {"num_features": module.num_features, "eps": module.eps, "momentum": module.momentum, "affine": module.affine}
            names = [*module._parameters, *module._buffers] if module.affine else list(module._buffers)
            return Leaf(path, cls, arguments, {k: f"{path}.{k}" for k in names}), (node.args[0],)
    return None


def _dropout(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    p = _argument(node, "p")
    scope = n.scope(node)
    here = n.modules.get(scope)
    path = scope if isinstance(here, nn.Dropout) and here.p == p else n.fresh(scope, "dropout")
    return Leaf(path, nn.Dropout, {"p": p}), (node.args[0],)


def _attention(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    p = _argument(node, "dropout_p")
    if not p:
        return None
    mask = _argument(node, "attn_mask")
    arguments = {
        "p": p,
        "is_causal": _argument(node, "is_causal"),
        "scale": _argument(node, "scale"),
        "enable_gqa": _argument(node, "enable_gqa"),
    }
    inputs = tuple(node.args[:3]) + ((mask,) if mask is not None else ())
    return Leaf(n.fresh(n.scope(node), "attention_op"), leaves.Attention, arguments), inputs


def _drop_path(n: Normaliser, node: fx.Node) -> tuple[Leaf, tuple[Any, ...]] | None:
    path = str(node.args[1])
    return Leaf(path, leaves.DropPath, {"p": drop_path_rate(n.modules[path]) or 0.0}), (node.args[0],)


_BUILDERS: dict[str, Any] = {
    "aten.linear.default": _linear,
    "aten.embedding.default": _embedding,
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.group_norm.default": _group_norm,
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.conv3d.default": _convolution,
    "aten.conv1d.padding": _convolution,
    "aten.conv2d.padding": _convolution,
    "aten.conv3d.padding": _convolution,
    "aten.batch_norm.default": _batch_norm,
    "aten.dropout.default": _dropout,
    "aten.scaled_dot_product_attention.default": _attention,
    str(DROP_PATH): _drop_path,
}
