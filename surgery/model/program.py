"""The Program: the one value that passes rewrite (graph, weights, anatomy, journal)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from surgery.core.site import Anatomy, NodeRef, Site
from surgery.core.source import NOWHERE, Span
from surgery.model.lazygraph import copy_tree
from surgery.model.past import Past

if TYPE_CHECKING:
    from surgery.core.method import Method
    from surgery.model.dims import Dims, Group
    from surgery.model.weights import Weights


@dataclass(frozen=True)
class ValueSpec:
    """Type of one value in the graph: ``shape`` holds ints and sympy expressions over the input symbols.

    ``kind`` is ``tensor``, ``int`` (a symbolic or plain integer: ``shape`` is then ``(value,)``), ``float``, ``bool`` or
    ``other``. Stands in ``node.meta["spec"]``; a node that returns several values has a tuple of specs there.
    """

    kind: str
    dtype: str = ""
    shape: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Signature:
    """How the flat graph is called.

    The root graph takes one placeholder per flat input (tensors; a cache is its key and value tensors) and returns a flat
    tuple. ``parameters`` are the keyword arguments of the original ``forward`` that were captured, in order; ``in_spec`` and
    ``out_spec`` are trees as plain data (see ``surgery.model.pytree``) that say how the flat values nest and which output
    classes (allow-listed: ModelOutput classes, caches, tuple, list, dict) they build. ``constants`` are non-tensor arguments
    fixed at capture. ``symbols`` maps each size symbol to (input, axis, traced size).
    """

    parameters: tuple[str, ...]
    in_spec: Any
    out_spec: Any
    constants: dict[str, Any] = field(default_factory=dict)
    symbols: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Which statement, method and pass made or changed something."""

    span: Span = NOWHERE
    verb: str = ""
    method: str = ""
    note: str = ""


class Journal:
    """For each tensor, module and node the origins that made or changed it, oldest first."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Origin]] = {}

    def record(self, subject: str | NodeRef, origin: Origin) -> None:
        key = subject if isinstance(subject, str) else f"{subject.graph}::{subject.node}"
        self.entries.setdefault(key, []).append(origin)

    def fold(self, subject: str | NodeRef, *origins: Origin) -> None:
        """Records origins that are not there yet: what was folded in keeps its history."""
        for origin in origins:
            if origin not in self.of(subject):
                self.record(subject, origin)

    def of(self, subject: str | NodeRef) -> tuple[Origin, ...]:
        key = subject if isinstance(subject, str) else f"{subject.graph}::{subject.node}"
        return tuple(self.entries.get(key, ()))


@dataclass(frozen=True)
class Attachment:
    """A module that surgery added and that is still in the graph.

    ``name`` is the label that ``@name`` selects (the ``as`` name, else the method's name), ``module`` the path of the added
    module, ``node`` the graph node that calls it, ``tensors`` the names of its parameters and buffers in ``weights``.
    """

    name: str
    method: Method
    site: Site
    module: str
    node: NodeRef
    tensors: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True)
class Gone:
    """A part of the model that a statement took away or replaced: what it was, by which statement, and ``how`` a message says it
    (``replaced by experts``, ``dropped``). ``heir`` is the label whose ``@name`` selects what stands there now, if something does."""

    site: Site
    origin: Origin
    how: str
    heir: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Where the model came from. ``family`` is the config's ``model_type`` ("" for a plain module), ``architecture`` the
    model class name, ``config`` the config as plain data, ``hash`` the identity of config and tensor headers, ``notes`` what the
    live model does in training and the captured one does not."""

    ref: str
    family: str = ""
    architecture: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    hash: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Program:
    """Graph, weights, anatomy and journal of one model.

    ``graph`` is a tree of GraphModules on meta tensors: the root, one per repeated layer, parametric leaves as nn modules at
    the original paths; aten operations between them. ``aliases`` maps every further name of a tied tensor to its
    first name. ``frozen`` holds the names of parameters that do not train. ``schedules`` are the training methods to carry.
    ``named`` are parts of the model itself that a statement made: the label that ``@name`` selects and the roles. ``gone`` are
    parts that no longer exist, by the role that they had; a role that exists again is not gone. ``past`` says what the tensors were in
    the model that this one was made from.
    """

    graph: fx.GraphModule
    signature: Signature
    weights: Weights
    info: ModelInfo
    aliases: dict[str, str] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    attachments: list[Attachment] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    schedules: list[tuple[Method, tuple[str, ...]]] = field(default_factory=list)
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gone: dict[str, Gone] = field(default_factory=dict)
    past: Past = field(default_factory=Past)
    _anatomy: Anatomy | None = None
    _dims: Dims | None = None
    _carry: Callable[[], Anatomy | None] | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Found on first use; :meth:`touch` forgets it after a change of the graph's base structure."""
        if self._anatomy is None:
            from surgery.model.anatomy import find_anatomy

            self._anatomy = (self._carry() if self._carry else None) or find_anatomy(self)
            self._carry = None
        return self._anatomy

    @property
    def dims(self) -> Dims:
        """Dimension classes of the model without what methods attached, on the flat graph ``dims.graph``; kept like the anatomy."""
        if self._dims is None:
            from surgery.model.dims import analyse
            from surgery.model.flat import flatten

            self._dims = analyse(flatten(self.graph, self.aliases, bare=True), aliases=self.aliases)
        return self._dims

    def touch(self, group: Group | None = None) -> None:
        """Forgets what was found out about the structure. After the cut of ``group`` the anatomy follows from the one before, where that was
        known; this, too, is done when it is asked for."""
        before, dims = self._anatomy, self._dims
        self._anatomy = self._dims = self._carry = None
        if group is not None and before is not None and dims is not None:
            from surgery.model.anatomy.carry import carried

            self._carry = partial(carried, before, dims, group.keep)

    def copy(self) -> Program:
        """An independent program: own graph (meta tensors), same immutable expressions."""
        out = replace(
            self, graph=copy_tree(self.graph), weights=type(self.weights)(self.weights), aliases=dict(self.aliases),
            journal=Journal(), attachments=list(self.attachments), frozen=set(self.frozen), schedules=list(self.schedules),
            named=dict(self.named), gone=dict(self.gone),
        )  # fmt: skip
        out.journal.entries = {k: list(v) for k, v in self.journal.entries.items()}
        return out

    def module(self, path: str) -> Any:
        """The module at a path; AttributeError where there is none."""
        module: Any = self.graph
        try:
            for leaf in path.split(".") if path else ():
                module = module._modules[leaf]
        except KeyError:
            return self.graph.get_submodule(path)  # which says what is missing
        return module if module is not None else self.graph.get_submodule(path)

    def node(self, ref: NodeRef) -> fx.Node:
        """The graph node behind a reference; KeyError when there is none."""
        for node in self.module(ref.graph).graph.nodes:
            if node.name == ref.node:
                return node
        raise KeyError(f"{ref.graph}::{ref.node}")
