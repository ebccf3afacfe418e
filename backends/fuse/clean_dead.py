"""What nobody reads goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView


@dataclass(frozen=True)
class DeadCode:
    """Operations whose results lead to no output are dropped, with the tensors that only they read. What writes to memory in place stays."""

    name: str = "dead_code"
    doc: str = "operations that no output depends on are dropped"
    order: int = 0
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        dead: set[fx.Node] = set()
        for node in reversed(view.nodes):  # readers first, so that a node has none left when its turn comes
            if node.op in ("placeholder", "output") or node.is_impure() or any(user not in dead for user in node.users):
                continue
            dead.add(node)
            if node.op != "get_attr":
                yield Match(node, lambda n=node: view.graph.graph.erase_node(n), str(node.target).removeprefix("aten."))  # type: ignore[misc]


RULE = DeadCode()
