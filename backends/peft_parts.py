"""What of a program an adapter folder can hold: changes of weights as thin factors, and tensors of the base that train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.backends.peft_experts import unreachable
from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.program import Attachment, Origin, Program
from surgery.model.realise import realise
from surgery.model.weights import Apply, nodes

CHANGES_BASE = ("prune", "share", "convert", "replace", "factorize", "skip", "fold", "insert")
"""Verbs after which an adapter alone would be put on another model than the one that the program is."""

START = "init_lora_weights"


@dataclass(frozen=True)
class Entry:
    """One attached change: ``says`` are the config fields that name its kind (None: it has to be factored), ``start`` its factors at the start
    where they were taken out of the base, as expressions."""

    attachment: Attachment
    method: Any
    site: Any
    says: Mapping[str, Any] | None
    rank: int
    start: Mapping[str, Apply] | None = None


@dataclass
class Said:
    """``parts`` by the path of their module, ``experts`` by the name of their tensor, ``whole`` modules and ``biases`` (tensors of the base that train), and ``flags`` of the config.

    ``native`` says that every part is stored as its method has it; else all are plain factors of scale 1.
    """

    parts: dict[str, list[Entry]] = field(default_factory=dict)
    experts: dict[str, list[Entry]] = field(default_factory=dict)
    whole: dict[str, list[str]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    native: bool = True
    truncated: list[Entry] = field(default_factory=list)

    def rank(self, path: str) -> int:
        return sum(e.rank * (2 if e.start is not None else 1) for e in self.parts[path])


def collect(
    program: Program, rank: int, span: Span | None, tokens: Sequence[Attachment] = (), tables: frozenset[str] = frozenset()
) -> Said:
    """What goes into a folder of low-rank changes. ``tokens`` are virtual ones, which go into another folder with all that trains whole and the
    ``tables`` of positions that were moved for them.

    Raises S0792 (the base was changed) and S0793 (something that such a folder cannot hold).
    """
    _base_as_it_was(program, span, tokens, tables)
    said = Said()
    for a in (a for a in program.attachments if not any(a is t for t in tokens)):
        path, entry = _entry(program, a, rank, span)
        if entry.site.op == "experts":
            said.experts.setdefault(path, []).append(entry)
            continue
        said.parts.setdefault(path, []).append(entry)
        if entry.says is None:
            said.truncated.append(entry)
    if said.experts and (why := unreachable(program, list(said.experts))):
        raise _cannot(next(iter(said.experts.values()))[0].attachment, why, span)
    _flags(said, span)
    trained(program, said, span)
    if tokens:
        said.whole = {}
    if not said.parts and not said.experts and not said.whole and not said.biases:
        raise fail(
            "S0793", "nothing in the model is an adapter", span, "asked for here",
            help="attach one with `adapt` or `merge` above this line; `emit transformers` writes whole models",
        )  # fmt: skip
    return said


def _base_as_it_was(program: Program, span: Span | None, tokens: Sequence[Attachment], tables: frozenset[str]) -> None:
    own = {x for a in tokens for x in (a.module, *a.tensors)} | tables
    theirs = {a.origin for a in tokens}
    added = {t for a in program.attachments for t in a.tensors}
    split = {(program.aliases.get(w, w), a.origin) for a in program.attachments if (w := _rebased(program, a))}
    for key, origins in program.journal.entries.items():
        if key in own or any(key.startswith(f"{a.module}.") for a in tokens):
            continue
        for origin in origins:
            if origin in theirs and origin.verb == "insert":
                continue
            merged = (
                origin.verb == "merge"
                and key in program.weights
                and key not in added
                and key in program.frozen
                and (key, origin) not in split
            )
            if origin.verb in CHANGES_BASE or merged:
                raise changed(origin, span)


def _rebased(program: Program, a: Attachment) -> str:
    """The weight that an attachment took a part out of, which is an adapter's own affair; else an empty text."""
    module = program.module(a.module)
    rebase = getattr(getattr(module, "method", None), "rebase", None)
    return f"{a.module.rpartition('.')[0]}.weight" if rebase is not None and rebase(module.site) else ""


def changed(origin: Origin, span: Span | None) -> Exception:
    if origin.verb == "insert":
        return fail(
            "S0793", f"`insert {origin.method}` adds modules, and an adapter folder holds changes of weights", span, "asked for here",
            also=[(origin.span, "added here")] if origin.span.end else (), help="`emit torch` keeps everything that is attached",
        )  # fmt: skip
    return fail(
        "S0792", f"`{origin.verb} {origin.method}` changed the base, and an adapter folder holds nothing of that", span, "asked for here",
        also=[(origin.span, "changed here")] if origin.span.end else (),
        help="emit the changed model (`emit transformers`) and train the adapter on it, or put this line above that statement",
    )  # fmt: skip


# ------------------------------------------------------------------ attached changes


def _cannot(a: Attachment, why: str, span: Span | None, help: str = "`emit torch` keeps it as it is") -> Exception:
    return fail(
        "S0793", f"{a.name} on {a.site.role} cannot go into an adapter folder: {why}", span, "asked for here",
        also=[(a.origin.span, "attached here")] if a.origin.span.end else (), help=help,
    )  # fmt: skip


def _entry(program: Program, a: Attachment, rank: int, span: Span | None) -> tuple[str, Entry]:
    module = program.module(a.module)
    method: Any = getattr(module, "method", None)
    site: Any = getattr(module, "site", None)
    path = a.module.rpartition(".")[0]
    if method is None or a.method.kind != "delta":
        raise _cannot(a, "it is no change of a weight", span)
    if getattr(site, "op", "") == "experts":
        return a.site.weight, _of_experts(a, module, method, span)
    names = {f"{path}.weight", program.aliases.get(f"{path}.weight", "")}
    if not names & set(program.weights):
        raise _cannot(a, "it stands on a bare parameter, not on a layer", span)
    if site.op == "conv" and (site.groups > 1 or any(d != 1 for d in site.dilation)):
        raise _cannot(a, "such files have no form for a convolution in groups or with gaps", span)
    if getattr(module, "masked", False):
        raise _cannot(a, "the weight has a mask, which such a folder does not hold", span)
    says = getattr(method, "exchange", None)
    own = getattr(method, "rank", None)
    size = own if says is not None else rank or own
    if not isinstance(size, int):
        raise _cannot(
            a,
            f"the change of {a.method.name} has to be factored, and nothing says to which rank",
            span,
            "say it: `emit peft(rank = 16) to ...`",
        )
    size = min(size, site.max_rank) if says is None else size
    start = None
    rebase = method.rebase(site)
    if rebase is not None:
        start = _start(program, path, method, site, rebase)
        if start is None and says is None:
            raise _cannot(a, "it took a part out of the base, and the base as it was is not known", span)
        if start is None and bool(getattr(method, "iterations", 0)):
            raise _cannot(a, "its start is a randomised decomposition of a base that is not known any more", span)
    return path, Entry(a, method, site, says, size, start)


def _of_experts(a: Attachment, module: Any, method: Any, span: Span | None) -> Entry:
    says = getattr(method, "exchange", None)
    why = (
        "the weight has a mask, which such a folder does not hold" if getattr(module, "masked", False)
        else f"the change that {a.method.name} makes of experts is no product of thin factors"
        if says is None or set(says) - {"use_rslora"} or method.rebase(module.site) is not None else ""
    )  # fmt: skip
    if why:
        raise _cannot(a, why, span)
    return Entry(a, method, module.site, says, int(method.rank))


def _start(program: Program, path: str, method: Any, site: Any, rebase: tuple[str, int]) -> dict[str, Apply] | None:
    """The expressions of the factors that were taken out of the base; None where the base is stored without them."""
    function, output = rebase
    name = f"{method.verb}/{method.name}:{function}"
    weight = program.weights[program.aliases.get(f"{path}.weight", f"{path}.weight")]
    for expr in nodes(weight):
        if isinstance(expr, Apply) and expr.function == name and expr.output == output and dict(expr.params).get("site") == site.pairs():
            return {
                s.name: Apply(tuple(s.shape), "float32", name, expr.args, expr.params, s.output)
                for s in method.tensors(site)
                if s.init == function
            }
    return None


def _flags(said: Said, span: Span | None) -> None:
    """What the config says of all parts at once; a folder has one word for all of them."""
    entries = [e for group in (*said.parts.values(), *said.experts.values()) for e in group]
    words = [dict(e.says or {}) if e.start is None else {} for e in entries]
    special = [i for i, w in enumerate(words) if "use_dora" in w or START in w]
    alone = all(len(g) == 1 and not g[0].site.rows for g in said.parts.values()) and not said.experts
    alike = len({tuple(sorted(w.items())) for w in words}) <= 1
    if special and not (alone and alike):
        a = entries[special[0]].attachment
        other = next((e.attachment for i, e in enumerate(entries) if words[i] != words[special[0]]), None)
        why = (
            f"{other.name} on {other.site.role} is of another kind, and a folder holds one"
            if other is not None
            else "it shares its layer with another, or is a slice of it"
        )
        raise _cannot(a, why, span, "emit them from two specs, or fold one of the two")
    said.native = alone and alike and all(e.says is not None and e.start is None for e in entries)
    said.flags = dict(words[0]) if said.native and words else {}


def factors(entry: Entry, program: Program, tensors: Any) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """``A`` and ``B`` (whole layer, stored layout), scale, and the magnitude of a weight-decomposed change."""
    site, method, a = entry.site, entry.method, entry.attachment
    t = {n.rpartition(".")[2]: tensors.of(program, n).float() for n in a.tensors}
    if entry.says is None:
        weight = None
        if method.wants_weight():
            path = a.module.rpartition(".")[0]
            weight = site.to_canonical(site.select(tensors.of(program, f"{path}.weight").float()))
        first, second = _thin(method.delta(site, t, weight), entry.rank)
        shape = (entry.rank, site.inp // site.groups, *site.kernel) if site.op == "conv" else first.shape
        left, right, scale = first.reshape(shape), second.reshape(*second.shape, *(1,) * len(site.kernel)), 1.0
    else:
        left, right = method.factors(site, t)
        scale = float(method.scale())
    if entry.start is not None:
        begin = {n: realise(e, functions=tensors.functions) for n, e in entry.start.items()}
        left, right = torch.cat([left, begin["A"]]), torch.cat([right, -begin["B"]], dim=1)
    return left, site.spread(right, axis=0), scale, t.get("magnitude")


def _thin(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


# ------------------------------------------------------------------ tensors of the base


def trained(program: Program, said: Said, span: Span | None) -> None:
    """Tensors of the base that train: biases one by one, everything else by whole modules."""
    added = {t for a in program.attachments for t in a.tensors}
    own = [n for n, _ in program.graph.named_parameters(remove_duplicate=False) if n not in added]
    firsts = {program.aliases.get(n, n) for n in own}
    trains = [n for n in own if program.aliases.get(n, n) not in program.frozen and program.aliases.get(n, n) in program.weights]
    if trains and not program.frozen & firsts:
        raise fail(
            "S0793", "everything in the model trains, so that it is no adapter", span, "asked for here",
            help="attach one with `adapt`, which freezes the base; `emit transformers` writes whole models",
        )  # fmt: skip
    for name in trains:
        path, _, leaf = name.rpartition(".")
        if leaf == "bias":
            said.biases.append(name)
            continue
        module = program.module(path)
        if path in said.parts or not path or any(True for _ in module.children()):
            why = "an adapter stands on it, too" if path in said.parts else "it is no parameter of a module of its own"
            raise fail(
                "S0793", f"`{name}` trains whole, and {why}", span, "asked for here", help="freeze it, or `emit torch`, which keeps what trains",
            )  # fmt: skip
        said.whole.setdefault(path, [f"{path}.{n}" for n in module._parameters if module._parameters[n] is not None])
    said.biases = [n for n in said.biases if n.rpartition(".")[0] not in said.whole]


def origin_of(entries: Iterable[Entry]) -> Sequence[Span]:
    """Where some changes were attached, each statement once."""
    return list(dict.fromkeys(e.attachment.origin.span for e in entries if e.attachment.origin.span.end))
