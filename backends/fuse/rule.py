"""What a fusion rule is: an object that finds places in a flat graph, and says why the places that look alike are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import fx

if TYPE_CHECKING:
    from surgery.backends.fuse.view import FuseView

ONNX, PT2 = "onnx", "pt2"


@dataclass(frozen=True)
class Target:
    """What the fused graph is for.

    ``backend`` is ``onnx`` or ``pt2``, ``device`` ``cpu`` or ``cuda``, ``precision`` the name that the language has for it (``fp32`` ...),
    ``opset`` the version of the ONNX operator set (0 for other backends). ``live`` holds the names of tensors that stay apart under their
    own names, because they are exchanged later: no rule may compute with their values or move them.
    """

    backend: str = ONNX
    device: str = "cpu"
    precision: str = "fp32"
    opset: int = 20
    live: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Match:
    """One place where a rule applies.

    ``node`` stands for the place: one node belongs to one match of a rule, and its name is how the engine finds the place again.
    ``apply`` rewrites the graph; it is called once, and not at all when an earlier match of the same round erased ``node``.
    ``what`` says what the place becomes, for the report.
    """

    node: fx.Node
    apply: Callable[[], None]
    what: str


@dataclass(frozen=True)
class Miss:
    """A place that the rule is about and that it leaves alone: ``condition`` is the first one that failed, in words that are the same at
    every such place; ``detail`` has what is particular to this one (sizes, names)."""

    node_name: str
    condition: str
    detail: str = ""


class Rule(Protocol):
    """``name`` is what reports and ``--why-not`` call it, ``doc`` one sentence; ``order`` decides which rule comes first, ``targets``
    the backends it is for.

    ``find`` looks at the graph and changes nothing. Its matches must not overlap; what becomes possible by applying them is found in
    the next round, for the engine asks again until nothing is found.
    """

    name: str
    doc: str
    order: int
    targets: frozenset[str]

    def find(self, view: FuseView) -> Iterable[Match | Miss]: ...
