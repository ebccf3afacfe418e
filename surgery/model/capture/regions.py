"""Regional tracing: while the whole model is exported, each repeated layer runs between two markers, and a layer that
would trace to the same operations as an earlier one is replaced by one stub.

The model's outer code runs for every layer, so masks, rotations and choices per layer are right by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core.progress import report
from surgery.model.capture import boards, markers
from surgery.model.capture.boards import Shape
from surgery.model.capture.replay import Visit, compare, layout, plain
from surgery.model.capture.stacks import Signatures, find_stacks, is_drop_path


@dataclass
class Region:
    """One call of a layer. ``same_as`` is the region whose body it shares (itself when traced)."""

    index: int
    path: str
    inputs: list[str]
    same_as: int


@dataclass
class _Call:
    """What a traced call was made with and gave, to recognise its twins."""

    region: int
    signature: Any
    tree: Any
    leaves: list[Any]
    tensors: list[Tensor]
    cached: int
    boards: list[Shape]
    out_tree: Any = None
    out_leaves: list[Any] = field(default_factory=list)
    outputs: list[markers.Like] = field(default_factory=list)
    out_boards: list[Shape] = field(default_factory=list)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "layers") and hasattr(value, "update") and hasattr(value, "get_seq_length")


class Regions:
    """Context manager that marks every layer of ``model`` for the export inside it. ``stubs`` = False traces each layer."""

    def __init__(self, model: nn.Module, stubs: bool) -> None:
        self.model = model
        self.stubs = stubs
        self.regions: list[Region] = []
        self._calls: list[_Call] = []
        self._signatures = Signatures()
        self._inside = False
        self._patched: list[nn.Module] = []
        self._layers = 0
        self._visits: dict[int, Visit] = {}
        self._replaying = False

    def __enter__(self) -> Regions:
        markers.stub_outputs.clear()
        report("capturing the model")
        for path in find_stacks(self.model):
            self._layers += 1
            module = self.model.get_submodule(path)
            self._signatures.of(module)
            self._patch(module, self._layer(path, module, module.forward))
        for path, module in self.model.named_modules():
            if is_drop_path(module):
                self._patch(module, self._drop_path(path))
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched.clear()
        markers.stub_outputs.clear()

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        if "forward" not in module.__dict__:  # a forward set by hand on the instance is left as it is
            module.__dict__["forward"] = forward
            self._patched.append(module)

    def _drop_path(self, path: str) -> Callable[[Tensor], Tensor]:
        return lambda x, *unused, **unused_too: x.clone() if self._replaying else markers.drop_path(x, path)

    def check(self) -> None:
        """Runs each stamped layer and the one it was stamped from on meta tensors; Fallback where they do different things."""
        pairs = [(self._visits[r.same_as], self._visits[r.index]) for r in self.regions if r.same_as != r.index]
        self._inside = self._replaying = True
        try:
            compare(pairs)
        finally:
            self._inside = self._replaying = False

    def _layer(self, path: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            return self._run(path, module, original, args, kwargs)

        return forward

    def _run(self, path: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with_path, tree = pytree.tree_flatten_with_path((args, kwargs), is_leaf=_is_cache)
        leaves = [leaf for _, leaf in with_path]
        caches = list({id(c): c for c in leaves if _is_cache(c) and not _keeps_nothing(c, module)}.values())
        slots = [_slot(c, module) for c in caches]
        if any(s is None for s in slots):
            return original(*args, **kwargs)
        names: list[str] = []
        tensors: list[Tensor] = []
        places: list[tuple[int, int]] = []
        positions: dict[int, int] = {}
        forward_names = _parameter_names(type(module).forward)
        for i, (key, leaf) in enumerate(with_path):
            if isinstance(leaf, Tensor):
                if id(leaf) not in positions:
                    positions[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                    names.append(_name_of(key, forward_names))
                places.append((i, positions[id(leaf)]))
        shared = {id(leaf): (_name_of(key, forward_names), leaf) for key, leaf in with_path if boards.is_board(leaf)}
        shapes = [boards.shape_of(board) for _, board in shared.values()]
        given = len(tensors)
        for name, board in shared.values():
            tensors += boards.tensors_of(board)
            names += [f"{name}_{key}_{i}" for key, count in boards.shape_of(board) for i in range(count)]
        for slot in slots:
            tensors += [slot.keys, slot.values]
            names += ["past_key", "past_value"]
        call = _Call(len(self.regions), self._signatures.of(module), tree, leaves, tensors, 2 * len(slots), shapes)
        twin = next((c for c in self._calls if self._same(c, call)), None) if self.stubs else None
        region = Region(call.region, path, names, call.region if twin is None else twin.region)
        self.regions.append(region)
        self._visits[region.index] = Visit(
            path, module, original, tree, [None if isinstance(leaf, Tensor) else plain(leaf) for leaf in leaves], places,
            [layout(t) for t in tensors], [(i, caches.index(leaf)) for i, leaf in enumerate(leaves) if any(leaf is c for c in caches)],
            [_layer_index(module) for _ in slots],
            [([i for i, leaf in enumerate(leaves) if leaf is board], type(board), boards.shape_of(board)) for _, board in shared.values()],
        )  # fmt: skip
        report("capturing the model: layers", min(len(self.regions), self._layers), self._layers)
        if twin is not None:
            markers.stub_outputs[region.index] = twin.outputs
            results = markers.stub(tensors, region.index)
            return self._finish(twin, results, slots, [board for _, board in shared.values()])
        self._calls.append(call)
        entered = markers.enter(tensors, region.index)
        inner = list(leaves)
        for i, position in places:
            inner[i] = entered[position]
        inner_args, inner_kwargs = pytree.tree_unflatten(inner, tree)
        rest = iter(entered[given:])
        for (_, board), shape in zip(shared.values(), shapes, strict=True):
            boards.fill(board, shape, rest)
        for slot in slots:
            slot.keys, slot.values = next(rest), next(rest)
        self._inside = True
        try:
            out = original(*inner_args, **inner_kwargs)
        finally:
            self._inside = False
        call.out_leaves, call.out_tree = pytree.tree_flatten(out, is_leaf=_is_cache)
        results = [leaf for leaf in call.out_leaves if isinstance(leaf, Tensor)]
        for _, board in shared.values():
            call.out_boards.append(boards.shape_of(board))
            results += boards.tensors_of(board)
        for slot in slots:
            results += [slot.keys, slot.values]
        call.outputs = [markers.Like.of(t) for t in results]
        return self._finish(call, markers.exit_(results, region.index), slots, [board for _, board in shared.values()])

    def _finish(self, call: _Call, results: list[Tensor], slots: list[Any], shared: list[Any]) -> Any:
        stream = iter(results)
        leaves = [next(stream) if isinstance(leaf, Tensor) else leaf for leaf in call.out_leaves]
        for board, shape in zip(shared, call.out_boards, strict=True):
            boards.fill(board, shape, stream)
        for slot in slots:
            slot.keys, slot.values = next(stream), next(stream)
        return pytree.tree_unflatten(leaves, call.out_tree)

    def _same(self, known: _Call, new: _Call) -> bool:
        """Whether the new call would trace to the known one's body: sizes are compared as the trace knows them by now,
        because symbols that differed when the first layer ran may have been found equal since."""
        if known.signature != new.signature or known.tree != new.tree or known.cached != new.cached or known.boards != new.boards:
            return False
        if len(known.tensors) != len(new.tensors):
            return False
        for a, b in zip(known.leaves, new.leaves, strict=True):
            if isinstance(a, Tensor) != isinstance(b, Tensor):
                return False
            if not isinstance(a, Tensor) and _static(a) != _static(b):
                return False
        order_a = _aliases(known)
        return order_a == _aliases(new) and all(_layout(a) == _layout(b) for a, b in zip(known.tensors, new.tensors, strict=True))


def _aliases(call: _Call) -> list[int]:
    index: dict[int, int] = {}
    return [index.setdefault(id(leaf), len(index)) for leaf in call.leaves if isinstance(leaf, Tensor)]


def _size(n: Any) -> Any:
    if isinstance(n, torch.SymInt):
        node = n.node
        return node.shape_env.simplify(node.expr)
    return n


def _layout(t: Tensor) -> tuple[Any, ...]:
    return (tuple(_size(n) for n in t.shape), tuple(_size(n) for n in t.stride()), t.dtype, t.device)


def _static(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return ("size", _size(value))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value).__name__, value)
    return ("id", id(value))


def _parameter_names(forward: Any) -> list[str]:
    code = getattr(forward, "__wrapped__", forward)
    code = getattr(code, "__code__", None)
    return list(code.co_varnames[1 : code.co_argcount]) if code is not None else []


def _name_of(key: tuple[Any, ...], positional: list[str]) -> str:
    """A readable placeholder name from where the tensor stands in the call."""
    parts = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", ""))) for k in key]
    if parts and parts[0] == 0 and len(parts) > 1 and isinstance(parts[1], int):
        parts[1] = positional[parts[1]] if parts[1] < len(positional) else f"arg{parts[1]}"
    return "_".join(str(p) for p in parts[1:]) or "x"


def _slot(cache: Any, module: nn.Module) -> Any:
    """The layer of ``cache`` that ``module`` updates: filled and growing; None when it cannot be told."""
    index = _layer_index(module)
    if index < 0 or not isinstance(cache.layers, list):
        return None
    if index >= len(cache.layers) or type(cache.layers[index]).__name__ != "DynamicLayer":
        return None
    layer = cache.layers[index]
    return layer if getattr(layer, "keys", None) is not None else None


def _keeps_nothing(cache: Any, module: nn.Module) -> bool:
    """The layer is handed a cache that has no place for it, since it reads the keys and values of an earlier one."""
    declared = any(m.__dict__.get("is_kv_shared_layer") is True for m in module.modules())
    return declared and isinstance(cache.layers, list) and _layer_index(module) >= len(cache.layers)


def _layer_index(module: nn.Module) -> int:
    """The one index that the parts of a layer hold; -1 when they hold none or several."""
    indices = {m.__dict__["layer_idx"] for m in module.modules() if isinstance(m.__dict__.get("layer_idx"), int)}
    return indices.pop() if len(indices) == 1 else -1
