"""The plan: everything a spec will do to a model, known before a weight is read. Plain data, its JSON and its text.

``surgery plan --format json`` prints :meth:`Plan.as_json`; its shape is a contract (schema ``surgery.plan/1``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from textwrap import wrap
from typing import Any

from surgery.core.diagnostics import Diagnostic
from surgery.core.source import Source, Span, portable

SCHEMA = "surgery.plan/1"


@dataclass(frozen=True)
class PlanSite:
    """One site of one step; counts are numbers of parameters."""

    role: str
    path: str
    rows: tuple[tuple[int, int], ...] = ()
    shape_before: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    added: int = 0
    removed: int = 0
    trainable: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "role": self.role, "path": self.path, "rows": [list(r) for r in self.rows],
            "shape_before": list(self.shape_before), "shape_after": list(self.shape_after),
            "added": self.added, "removed": self.removed, "trainable": self.trainable,
        }  # fmt: skip


@dataclass(frozen=True)
class PlanStep:
    """One statement that changes, trains or emits; ``text`` is the statement as printed."""

    span: Span
    verb: str
    method: str
    params: dict[str, Any]
    sites: tuple[PlanSite, ...] = ()
    text: str = ""
    doc: str = ""
    stage: str = ""
    facts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        place = {"file": self.span.source.name, "line": self.span.line, "column": self.span.column}
        return {
            "span": place, "verb": self.verb, "method": self.method, "params": self.params,
            "sites": [s.as_json() for s in self.sites],
        }  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """An ``expect`` statement: ``ok`` is None while it awaits the weights; ``detail`` is the arithmetic in words."""

    text: str
    ok: bool | None
    value: float | None
    limit: float | None
    detail: str = ""
    span: Span | None = None

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "ok": self.ok, "value": self.value, "limit": self.limit}


@dataclass(frozen=True)
class Totals:
    params_before: int
    params_after: int
    trainable: int
    bytes_before: int
    bytes_after: int
    flops_per_token_before: int
    flops_per_token_after: int
    trainable_before: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "params_before": self.params_before, "params_after": self.params_after, "trainable": self.trainable,
            "bytes_after": self.bytes_after, "flops_per_token_before": self.flops_per_token_before,
            "flops_per_token_after": self.flops_per_token_after,
        }  # fmt: skip


@dataclass
class Plan:
    """What a spec does to a model. ``model`` holds ref, family, hash, params and bytes, and notes where there are any."""

    spec: str
    edition: int
    model: dict[str, Any]
    steps: list[PlanStep] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    totals: Totals | None = None
    diagnostics: list[Diagnostic] = field(default_factory=list)
    flops_length: int = 128
    flops_unit: str = "token"
    """What the operations are counted for: ``token`` (in a sequence of ``flops_length``), or ``image``, ``sample`` where there are none."""

    @property
    def flops_at(self) -> str:
        return f"at length {self.flops_length}" if self.flops_unit == "token" else ""

    @property
    def ok(self) -> bool:
        return not any(d.is_error for d in self.diagnostics) and all(e.ok is not False for e in self.expectations)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "edition": self.edition,
            "model": self.model,
            "steps": [s.as_json() for s in self.steps],
            "totals": self.totals.as_json() if self.totals else None,
            "expect": [e.as_json() for e in self.expectations],
            "diagnostics": [d.as_json() for d in self.diagnostics],
        }

    def render_text(self) -> str:
        return render(self)

    def portable(self) -> Plan:
        """A copy for outputs: names of files without their folders, no absolute path in the model's reference."""
        known: dict[str, Source] = {}

        def moved(span: Span) -> Span:
            source = known.setdefault(span.source.name, Source(PurePath(span.source.name).name, span.source.text))
            return Span(source, span.start, span.end)

        return replace(
            self, spec=PurePath(self.spec).name, model={**self.model, "ref": portable(str(self.model["ref"]))},
            steps=[replace(s, span=moved(s.span)) for s in self.steps],
            expectations=[replace(e, span=moved(e.span) if e.span else None) for e in self.expectations],
            diagnostics=[replace(d, labels=tuple(replace(x, span=moved(x.span)) for x in d.labels)) for d in self.diagnostics],
        )  # fmt: skip


def group_roles(roles: Sequence[str]) -> list[str]:
    """Short names of many roles: runs of an index collapse, ``layers[0].attn.q`` ... give ``layers[0..5].attn.q``.

    Only roles that differ in their first index collapse together; order of first appearance is kept.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for role in roles:
        head, bracket, rest = role.partition("[")
        number, close, tail = rest.partition("]")
        if bracket and close and number.lstrip("-").isdigit():
            groups.setdefault((head, tail), []).append(int(number))
        else:
            groups.setdefault((role, "\0"), [])
    out = []
    for (head, tail), numbers in groups.items():
        out.append(head if tail == "\0" else f"{head}[{_runs(sorted(set(numbers)))}]{tail}")
    return out


def _runs(numbers: Sequence[int]) -> str:
    parts: list[str] = []
    start = previous = numbers[0]
    for n in [*numbers[1:], None]:  # type: ignore[list-item]
        if n is not None and n == previous + 1:
            previous = n
            continue
        parts.append(str(start) if start == previous else f"{start}..{previous}")
        if n is not None:
            start = previous = n
    return ", ".join(parts)


def size(count: float) -> str:
    """Bytes for people: ``86.6 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def flops(count: float) -> str:
    """FLOPs for people: ``42.5 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:g} "


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shape_text(shapes: Iterable[tuple[int, ...]]) -> str:
    """Distinct shapes in order, at most three."""
    seen = list(dict.fromkeys(" x ".join(str(n) for n in s) for s in shapes if s))
    return ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")


def render(plan: Plan) -> str:
    """The plan as text for people, 110 columns or less where names allow it."""
    model = plan.model
    family = model.get("family") or "module"
    lines = [
        f"plan of {plan.spec} on {model['ref']} ({family}, {model['params']:,} parameters, {size(model['bytes'])})",
        *(f"note: {note}" for note in model.get("notes", ())),
    ]
    width = max([len(str(s.span.line)) for s in plan.steps], default=1)
    stage = ""
    for step in plan.steps:
        lines.append("")
        if step.stage and step.stage != stage:
            lines.append(f"stage {step.stage}")
        stage = step.stage
        pad = " " * (width + 4)
        for row in step.doc.splitlines():
            lines.append(f"{pad}## {row}")
        first, *more = step.text.splitlines() or [f"{step.verb} {step.method}"]
        lines.append(f"  {step.span.line:>{width}}  {first}")
        lines += [pad + row for row in more]
        lines += [pad + row for row in _site_lines(step)]
        lines += [f"{pad}{fact}" for fact in step.facts]
    if plan.expectations:
        lines.append("")
        for e in plan.expectations:
            mark = {True: "ok    ", False: "FAILED", None: "later "}[e.ok]
            lines.append(f"  {mark}  expect {e.text}")
            lines += [" " * 10 + row for part in e.detail.split("; ") if part for row in wrap(part, 98)]
    if plan.totals:
        lines += ["", *_totals(plan.totals, plan)]
    return "\n".join(lines) + "\n"


def _site_lines(step: PlanStep) -> list[str]:
    if not step.sites:
        return []
    names = group_roles([s.role for s in step.sites])
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    shapes = shape_text(s.shape_before for s in step.sites)
    out = [f"{plural(len(step.sites), 'site')}: {shown}" + (f" ({shapes})" if shapes else "")]
    added, removed = sum(s.added for s in step.sites), sum(s.removed for s in step.sites)
    trainable = sum(s.trainable for s in step.sites)
    parts = []
    if added:
        parts.append(f"+ {added:,} parameters")
    if removed:
        parts.append(f"- {removed:,} parameters")
    if added or trainable:
        parts.append(f"{trainable:,} train")
    if parts:
        out.append(", ".join(parts))
    out += [f"note: {note}" for note in _notes([s.note for s in step.sites if s.note])]
    return out


def _notes(notes: list[str]) -> list[str]:
    """Each note once; notes that count something (``2 tensors frozen``) are summed over the sites."""
    counts: dict[tuple[str, str], int] = {}
    out: dict[str | tuple[str, str], None] = {}
    for note in notes:
        number, _, what = note.partition(" ")
        if not number.isdigit():
            out[note] = None
            continue
        noun, _, rest = what.partition(" ")
        key = noun.removesuffix("s"), rest
        counts[key] = counts.get(key, 0) + int(number)
        out[key] = None
    return [n if isinstance(n, str) else f"{plural(counts[n], n[0])} {n[1]}" for n in out]


def _totals(t: Totals, plan: Plan) -> list[str]:
    share = 100 * t.trainable / t.params_after if t.params_after else 0.0

    def change(before: int, after: int) -> str:
        if before == after:
            return "unchanged"
        return f"{100 * (after - before) / before:+.3g}%" if before else ""

    rows = [
        ("", "before", "after", ""),
        ("parameters", f"{t.params_before:,}", f"{t.params_after:,}", change(t.params_before, t.params_after)),
        ("trainable", f"{t.trainable_before:,}", f"{t.trainable:,}", f"{share:.3g}% of the model after"),
        ("bytes", size(t.bytes_before), size(t.bytes_after), change(t.bytes_before, t.bytes_after)),
        (
            f"flops per {plan.flops_unit}", flops(t.flops_per_token_before), flops(t.flops_per_token_after),
            ", ".join(filter(None, (change(t.flops_per_token_before, t.flops_per_token_after), plan.flops_at))),
        ),
    ]  # fmt: skip
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return [f"  {r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]}".rstrip() for r in rows]
