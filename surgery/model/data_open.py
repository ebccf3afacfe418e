"""The data of a spec by name: opened at the statement that uses it, once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.core import ast
from surgery.core.spec import Checked
from surgery.model.data import Samples
from surgery.model.data_tensors import tensor_samples
from surgery.model.data_text import Ask, text_samples
from surgery.model.program import Program


class Shelf:
    """Opens ``data`` statements. ``digests`` holds the content hash of what was opened, by name: the lock keeps it."""

    def __init__(self, data: Mapping[str, Checked], checkpoint: Any = None) -> None:
        self.data = data
        self.checkpoint = checkpoint
        self.opened: dict[str, Samples] = {}
        self.digests: dict[str, str] = {}

    def open(self, name: str, program: Program) -> Samples:
        """The samples of ``name`` for a program. No weight is read. Raises S0740-S0751 and S0756 for what is wrong with the data."""
        if name not in self.opened:
            self.opened[name] = open_data(self.data[name], program, self.checkpoint)
            self.digests[name] = self.opened[name].digest
        return self.opened[name].bind(program)


def open_data(checked: Checked, program: Program, checkpoint: Any) -> Samples:
    """The chosen samples of one ``data`` statement."""
    ask = ask_of(checked)
    assert checked.call is not None
    if checked.call.name == "tensors":
        return tensor_samples(ask, program)
    return text_samples(ask, program, checkpoint)


def ask_of(checked: Checked) -> Ask:
    call, node = checked.call, checked.node
    assert call is not None and isinstance(node, ast.Data)
    shown = str(call.get("path"))
    source = node.span.source.name
    base = Path() if source in ("<text>", "<stdin>", "<nowhere>") else Path(source).parent

    def span(name: str) -> Any:
        return call.spans.get(name, call.span)

    known = {p.name for p in call.info.params}
    return Ask(
        path=base / shown, shown=shown, samples=call.get("samples"), length=call.args.get("length"), seed=int(call.get("seed") or 0),
        batch=int(call.get("batch")), field=str(call.get("field")) if "field" in known else None, span=span("path"),
        samples_span=span("samples"), length_span=span("length"), field_span=span("field"),
    )  # fmt: skip
