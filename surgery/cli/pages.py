"""Markdown pages of methods and of the language's own tables; ``docs/methods`` and ``surgery explain`` show the same text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.core.catalogue import Entry, Quantity
from surgery.core.checker_words import limits, show
from surgery.core.method import MethodInfo, ParamInfo

FOLDS = {
    "merge": "into the weights, exactly",
    "widen": "into wider weights",
    "gemm": "its first product into the one in front of it",
    "const": "to a constant",
    "kvcache": "into the initial key/value cache",
    "slice": "by cutting the weights",
    "none": "cannot be folded",
}
IDENTITY = {
    "exact": "unchanged right after the surgery",
    "near": "nearly unchanged right after the surgery, within the stated bound",
    "changed": "changes by design",
}


def method_page(info: MethodInfo) -> str:
    """The page of one method: its docstring, its parameters, its facts."""
    places = ", ".join(f"`{p}`" for p in info.places) if info.places else "takes no place"
    lines = [f"# {info.verb} {info.name}", "", _markdown(info.doc), ""]
    lines += _parameters(info.params)
    lines += [
        "| | |",
        "|---|---|",
        f"| place | {places}{'' if info.needs_sites else ', selector optional'} |",
        f"| data | {'needs `using`' if info.needs_data else 'for some values, with `using`' if info.takes_data else 'none'} |",
        f"| output | {IDENTITY.get(info.identity, info.identity)} |",
        f"| fold | {FOLDS.get(info.fold, info.fold)} |",
        f"| version | {info.version} |",
    ]
    return "\n".join(lines) + "\n"


def entry_page(entry: Entry, word: str) -> str:
    """The page of a backend, a check or a data source; ``word`` is the statement's keyword."""
    return (
        "\n".join(
            [
                f"# {word} {entry.name}",
                "",
                entry.summary[0].upper() + entry.summary[1:] + ".",
                "",
                *_parameters(entry.params, entry.positional),
            ]
        ).rstrip()
        + "\n"
    )


def quantity_page(quantity: Quantity) -> str:
    unit = {"bytes": "a size such as `500MB`, or a percentage", "share": "a share such as `30%`"}.get(
        quantity.dimension, "a count such as `300k`, or a percentage"
    )
    return f"# expect {quantity.name}\n\n{quantity.summary[0].upper()}{quantity.summary[1:]}. Compared with {unit}.\n"


def _markdown(doc: str) -> str:
    """A docstring as Markdown: indented blocks are fenced, as a spec when they read like one; double backticks become single."""
    out: list[str] = []
    block: list[str] = []

    def close() -> None:
        while block and not block[-1].strip():
            block.pop()
        if block:
            text = [b[4:] for b in block]
            spec = re.match(
                r"\s*(adapt|insert|freeze|unfreeze|fold|train|merge|measure|prune|share|convert|replace|factorize|skip|emit|expect)\s",
                text[0],
            )
            out.extend([f"```{'surg' if spec else 'text'}", *text, "```", ""])
            block.clear()

    for line in doc.splitlines():
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
            continue
        close()
        out.append(line.replace("``", "`"))
    close()
    return "\n".join(out).rstrip()


def _parameters(params: Sequence[ParamInfo], positional: Sequence[str] = ()) -> list[str]:
    if not params:
        return ["No parameters.", ""]
    rows = ["| parameter | takes | default | meaning |", "|---|---|---|---|"]
    for p in params:
        default = "required" if p.required else "" if p.default is None else f"`{_shown(p)}`"
        name = f"`{p.name}`" + (" (first, without its name)" if p.name in positional else "")
        rows.append(f"| {name} | {takes(p)} | {default} | {p.help.replace('|', '/')} |")
    return [*rows, ""]


def _shown(p: ParamInfo) -> str:
    if isinstance(p.default, list | tuple):
        return "[" + ", ".join(str(v) for v in p.default) + "]"
    return f'"{p.default}"' if p.type == "str" else show(p.default, p.unit)


def takes(p: ParamInfo) -> str:
    """Type, range and unit of a parameter in words."""
    if p.choices:
        more = {"int": "whole number", "float": "number", "list": "list"}
        return ", ".join([*(f"`{c}`" for c in p.choices), *(more.get(t, t) for t in p.also)])
    low, high = limits(p)
    words = {"int": "whole number", "float": "number", "bool": "`true`, `false`", "str": "text", "list": "list"}.get(p.type, "name")
    if p.unit == "%":
        words = f"share, {show(low, '%')} to {show(high, '%')}"
    else:
        words = {"bytes": "size in bytes", "tokens": "tokens"}.get(p.unit, words)
        if low is not None and high is not None:
            words += f", {show(low)} to {show(high)}"
        elif low is not None:
            words += f", at least {show(low)}"
        elif high is not None:
            words += f", at most {show(high)}"
    return words + (", or by layer" if p.per_layer else "")
