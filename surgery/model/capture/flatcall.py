"""Running ``torch.export`` on a model as a function of flat tensors."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import SurgeryError
from surgery.model import pytree
from surgery.model.capture import markers
from surgery.model.capture.casts import casting
from surgery.model.capture.errors import Fallback, capture_error, refuse_data_sizes, refuse_fixed_counts, watch_sizes
from surgery.model.capture.literals import Literals
from surgery.model.capture.questions import name_input
from surgery.model.capture.regions import Region, Regions
from surgery.model.capture.routing import countable
from surgery.model.capture.scans import whole_scans

Axes = dict[int, str]  # axis -> name of its size; axes with one name have one size; "a+b" is a sum of others, "4*a" a multiple of one


@dataclass
class Call:
    """How a model is called: named values that nest tensors, the flat tensors' names, and the named sizes of their axes."""

    values: dict[str, Any]
    axes: dict[str, Axes]
    constants: dict[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()  # axis names whose size may turn out fixed without being an error

    def tree(self) -> pytree.Tree:
        return pytree.spec_of(self.values)

    def flat(self) -> list[tuple[str, Tensor]]:
        return list(zip(flat_names(self.tree()), pytree.flatten(self.values, self.tree()), strict=True))


def flat_names(tree: pytree.Tree, prefix: str = "") -> list[str]:
    """Names of a tree's leaves in order: ``input_ids``, ``past_key_values_key_0`` ..."""
    kind = tree["type"]
    if kind == "tensor":
        return [prefix or "x"]
    if kind == "cache":
        parts = ("",) if tree["class"] == "DynamicCache" else ("_self", "_cross")
        return [f"{prefix}{part}_{what}_{i}" for part in parts for what in ("key", "value") for i in range(tree["layers"])]
    keys = tree.get("keys") or [str(i) for i in range(len(tree.get("items", [])))]
    return [
        name
        for key, item in zip(keys, tree.get("items", []), strict=True)
        for name in flat_names(item, f"{prefix}_{key}" if prefix else key)
    ]


def cache_names(tree: pytree.Tree, prefix: str = "") -> set[str]:
    """Those of :func:`flat_names` that are tensors of a cache."""
    if tree["type"] == "cache":
        return set(flat_names(tree, prefix))
    keys = tree.get("keys") or [str(i) for i in range(len(tree.get("items", [])))]
    return {
        n for key, item in zip(keys, tree.get("items", []), strict=True) for n in cache_names(item, f"{prefix}_{key}" if prefix else key)
    }


class Likes:
    """Which flat inputs are traced as copies of another one.

    A deep model's cache is hundreds of tensors of one form, and the tracer spends most of its time on giving each sizes of its own and finding
    them equal. So the first of a form is an input of the trace and an operation stands for the others until the trace is done.
    """

    def __init__(self, call: Call) -> None:
        caches = cache_names(call.tree())
        self.names = [name for name, _ in call.flat()]
        self.groups: dict[Any, list[int]] = {}
        for i, (name, leaf) in enumerate(call.flat()):
            axes = tuple(sorted(call.axes.get(name, {}).items()))
            key = (tuple(leaf.shape), leaf.stride(), leaf.dtype, axes) if name in caches else name
            self.groups.setdefault(key, []).append(i)
        self.first = [members[0] for members in self.groups.values()]

    def spread(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All flat inputs from those that the trace has."""
        out: dict[int, Tensor] = {}
        for tensor, (first, *rest) in zip(given, self.groups.values(), strict=True):
            out[first] = tensor
            if rest:
                out.update(zip(rest, markers.likes(tensor, len(rest)), strict=True))
        return tuple(out[i] for i in range(len(out)))

    def restore(self, graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        """Placeholders for all flat inputs, in order, from those of the trace; the operations are gone."""
        found: dict[int, fx.Node] = {}
        for node, (first, *rest) in zip(inputs, self.groups.values(), strict=True):
            found[first] = node
            made = next((n for n in node.users if n.target is markers.LIKES), None) if rest else None
            for position, i in enumerate(rest):
                with graph.inserting_after(inputs[-1]):
                    new = found[i] = graph.placeholder(self.names[i])
                new.meta["val"] = node.meta["val"]
                for user in [u for u in made.users if u.args[1] == position] if made is not None else []:
                    user.replace_all_uses_with(new)
                    graph.erase_node(user)
            if made is not None:
                graph.erase_node(made)
        ordered = [found[i] for i in range(len(found))]
        for before, node in pairwise(ordered):
            before.append(node)
        return ordered


class FlatModel(nn.Module):
    """The model behind a flat signature. ``note`` receives the tree of its output (an attribute would be reset by the export)."""

    def __init__(
        self, model: nn.Module, call: Call, note: Callable[[pytree.Tree], None], fixed: dict[Any, tuple[str, str]], likes: Likes
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.tree = call.tree()
        self.names = flat_names(self.tree)
        self.likes = likes
        self.note = note
        self.watch = lambda size: watch_sizes(size.node.shape_env, fixed)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        self._unify(given)
        leaves = self.likes.spread(given)
        for name, leaf in zip(self.names, leaves, strict=True):
            name_input(leaf, name)
        values = _build(iter(leaves), self.tree)
        out = self.model(**values, **self.call.constants)
        tree = pytree.spec_of(out)
        self.note(tree)
        return tuple(pytree.flatten(out, tree))

    def _unify(self, leaves: tuple[Tensor, ...]) -> None:
        """Tells the tracer which sizes are one: every open axis starts with a symbol of its own."""
        first: dict[str, Any] = {}
        sums = []
        for name, leaf in zip([self.names[i] for i in self.likes.first], leaves, strict=True):
            for axis, size in self.call.axes.get(name, {}).items():
                if "+" in size or "*" in size:
                    sums.append((leaf.shape[axis], size))
                    continue
                if isinstance(leaf.shape[axis], torch.SymInt):
                    self.watch(leaf.shape[axis])
                if size in first:
                    torch._check(leaf.shape[axis] == first[size])
                else:
                    first[size] = leaf.shape[axis]
        for actual, size in sums:
            if "*" in size:
                times, one = size.split("*")
                torch._check(actual == int(times) * first[one])
                continue
            left, right = size.split("+")
            if left in first and right in first:
                torch._check(actual == first[left] + first[right])


def _build(stream: Iterator[Tensor], tree: pytree.Tree) -> Any:
    """Like ``pytree.unflatten``, but a cache holds its tensors as they are: filling one the usual way would trace a
    concatenation with nothing for each layer."""
    kind = tree["type"]
    if kind == "cache" and tree["class"] == "DynamicCache":
        n = tree["layers"]
        keys = [next(stream) for _ in range(n)]
        return filled_cache(keys, [next(stream) for _ in range(n)])
    if kind == "dict":
        return {k: _build(stream, item) for k, item in zip(tree["keys"], tree["items"], strict=True)}
    if kind in ("list", "tuple"):
        items = [_build(stream, item) for item in tree["items"]]
        return items if kind == "list" else tuple(items)
    return pytree.unflatten(stream, tree)


def filled_cache(keys: list[Tensor], values: list[Tensor]) -> Any:
    """A ``DynamicCache`` that holds these tensors themselves, one pair a layer, shape (batch, kv heads, past, head width)."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for k, v in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = k, v
        layer.dtype, layer.device, layer.is_initialized = k.dtype, k.device, True
        cache.layers.append(layer)
    return cache


@dataclass
class Trace:
    """A raw export: the flat program, the calls of layers found in it, the output's tree, the flat names, and the rates at
    which the model's code would skip layers in training, and what it asked about its masks."""

    exported: torch.export.ExportedProgram
    regions: list[Region]
    out_tree: pytree.Tree
    names: list[str]
    likes: Likes
    skips: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()


class _Draw(float):
    """The number one in the place of a random draw: below no rate, and it notes the rates that it is compared with."""

    rates: dict[float, None]

    def __lt__(self, rate: Any) -> bool:
        self.rates[float(rate)] = None
        return False

    __le__ = __lt__


@contextlib.contextmanager
def _quiet(skips: dict[float, None]) -> Iterator[None]:
    """No tracer chatter, and layer drop off: Python code that skips whole layers at random has no graph, and the usual
    draw ``torch.rand([]) < rate`` never skips when it draws one. The rates are noted in ``skips``."""
    rand = torch.rand

    def draw(*size: Any, **kwargs: Any) -> Any:
        if size != ([],) or kwargs:
            return rand(*size, **kwargs)
        one = _Draw(1.0)
        one.rates = skips
        return one

    names = ("torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export", "torch._subclasses.fake_tensor", "transformers")
    loggers = [logging.getLogger(n) for n in names]
    levels = [lg.level for lg in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for lg in loggers:
            lg.setLevel(logging.CRITICAL)
        torch.rand = draw  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.rand = rand
            for lg, level in zip(loggers, levels, strict=True):
                lg.setLevel(level)


@contextlib.contextmanager
def _lean(stubs: bool) -> Iterator[None]:
    """With stubs each layer runs once: the tracer's memory of earlier operations costs more than it gives. Nor are the lines of model code noted
    at every node; a full trace notes them, and whatever needs them for a message makes one."""
    import torch._dynamo.config as settings

    if not stubs:
        yield
        return
    noted = getattr(fx.config, "do_not_emit_stack_traces", None)  # a private switch: a torch without it takes longer
    if noted is not None:
        fx.config.do_not_emit_stack_traces = True
    try:
        with settings.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if noted is not None:
            fx.config.do_not_emit_stack_traces = noted


def trace(model: nn.Module, call: Call, *, stubs: bool) -> Trace:
    """Exports ``model`` (on meta, nothing requiring grad) in its current mode. Raises SurgeryError S0501-S0503."""
    found: list[pytree.Tree] = []
    fixed: dict[Any, tuple[str, str]] = {}
    likes = Likes(call)
    flat = FlatModel(model, call, found.append, fixed, likes)
    flat.training = model.training
    hard, soft = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    dynamic = tuple(
        {a: soft if size in call.optional else hard for a, size in call.axes.get(flat.names[i], {}).items()} for i in likes.first
    )
    every = [leaf for _, leaf in call.flat()]
    leaves = tuple(every[i] for i in likes.first)
    skips: dict[float, None] = {}
    with (
        _quiet(skips),
        _lean(stubs),
        Regions(model, stubs) as regions,
        Literals(model) as literals,
        whole_scans(model),
        casting(model),
        countable(),
    ):
        try:
            exported = torch.export.export(flat, leaves, dynamic_shapes=(dynamic,), strict=False)
        except Fallback:
            raise
        except Exception as error:
            raise capture_error(error, model, fixed) from error
        regions.check()
    try:
        refuse_data_sizes(model, exported.graph)
        refuse_fixed_counts(model, exported.graph)
    except SurgeryError:
        if stubs:
            return trace(model, call, stubs=False)  # raises the same, with the line of model code
        raise
    return Trace(
        exported,
        regions.regions,
        found[-1],
        flat.names,
        likes,
        tuple(rate for rate in skips if rate > 0),
        tuple(literals.questions.answers),
    )
