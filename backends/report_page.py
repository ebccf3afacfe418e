"""The HTML of a report: anatomy before and after as pictures, what each statement did, expectations, certificates.

One page without scripts, fonts or requests of any kind. Colours carry no meaning alone: every cell has its number in a
title, and tables repeat what the pictures show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from surgery.backends import report_maps
from surgery.core.plan import Plan, flops, group_roles, size
from surgery.core.site import Site
from surgery.model.program import Program

STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--paper:#fff;--panel:#f6f8fa;--good:#1a7f4b;--bad:#b42318;--accent:#2457a6}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--line:#343c48;--paper:#12161c;--panel:#1a2028;--good:#4cc38a;--bad:#ff7b72;--accent:#7aa7f0}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;max-width:1080px;padding:2rem 1rem 4rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p{margin:.3rem 0}.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.88rem}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code,pre{font:12.5px/1.45 ui-monospace,monospace}
pre{background:var(--panel);padding:.8rem;overflow:auto;border-radius:6px;margin:.3rem 0}.ok{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}.pics{display:flex;gap:2rem;flex-wrap:wrap}.pics figure{margin:0}figcaption{color:var(--soft);font-size:.85rem;margin-bottom:.3rem}
svg text{fill:var(--ink);font:11px ui-monospace,monospace}svg .edge{stroke:var(--line)}
"""


def render(
    plan: Plan,
    base: Program,
    program: Program,
    certificates: Sequence[Mapping[str, Any]],
    spec_text: str,
    *,
    tensors: Any = None,
    outputs: Sequence[tuple[str, str, Any]] = (),
    timings: Sequence[tuple[str, ...]] = (),
) -> str:
    """The page as text. Deterministic but for ``timings``: no dates, no paths of the machine.

    ``tensors`` realises weights, to count the use of experts. ``outputs`` are what was emitted before: backend, path as the spec says it, and
    the :class:`~surgery.backends.protocol.Emitted`. ``timings`` are rows of a table whose first row is its head.
    """
    model = plan.model
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(plan.spec)}: surgery report</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(plan.spec)}</h1>",
        f"<p class=soft>on {escape(str(model['ref']))} ({escape(str(model['family'] or 'module'))}), "
        f"{model['params']:,} parameters, {size(model['bytes'])}</p>",
        _totals(plan),
        _pictures(base, program),
        report_maps.heads(program, base),
        report_maps.widths(program, base),
        report_maps.experts(program, tensors) if tensors is not None else "",
        _ranks(program),
        _timings(timings),
        _steps(plan),
        _expectations(plan),
        _certificates(certificates),
        _fusions(outputs),
        _outputs(outputs),
        f"<h2>The spec</h2><pre>{escape(spec_text.rstrip())}</pre>",
        "</body></html>\n",
    ]
    return "\n".join(p for p in parts if p)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """``rows`` hold HTML; columns in ``numbers`` are right-aligned."""
    mark = [" class=n" if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{escape(h)}</th>" for h, m in zip(head, mark, strict=True))
    body = "".join("<tr>" + "".join(f"<td{m}>{c}</td>" for c, m in zip(row, mark, strict=True)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _totals(plan: Plan) -> str:
    t = plan.totals
    if t is None:
        return ""
    share = f"{100 * t.trainable / t.params_after:.3g}% of the model" if t.params_after else ""
    rows = [
        ("parameters", f"{t.params_before:,}", f"{t.params_after:,}", ""),
        ("trainable", f"{t.trainable_before:,}", f"{t.trainable:,}", share),
        ("bytes", size(t.bytes_before), size(t.bytes_after), ""),
        (f"flops per {plan.flops_unit}", flops(t.flops_per_token_before), flops(t.flops_per_token_after), plan.flops_at),
    ]
    return "<h2>Totals</h2>" + _table(("", "before", "after", ""), rows, (1, 2))


CELL_W, CELL_H, LEFT, TOP = 76, 20, 120, 22


def _grid(sites: Iterable[Site]) -> dict[str, dict[str, Site]]:
    """Parametric sites by row (the layer) and column (the role inside the layer)."""
    rows: dict[str, dict[str, Site]] = {}
    for s in sites:
        if s.is_region or not s.weight:
            continue
        head, bracket, tail = s.role.rpartition("].")
        row, column = (head + "]", tail) if bracket else ("", s.role)
        rows.setdefault(row, {})[column] = s
    return rows


def _short(column: str, most: int = 11) -> str:
    """A role's last words, as many as a column's head has room for."""
    words = column.split(".")
    while len(".".join(words)) > most and len(words) > 1:
        words = words[1:]
    return ".".join(words)[:most]


def _picture(title: str, program: Program, columns: list[str], top: float, added: Mapping[str, int]) -> str:
    """One row per layer, one cell per site: the darker, the more parameters; a dot marks what surgery added."""
    rows = {r: c for r, c in _grid(program.anatomy.sites).items() if r}
    width, height = LEFT + CELL_W * len(columns) + 8, TOP + CELL_H * len(rows) + 8
    out = [f"<figure><figcaption>{escape(title)}</figcaption><svg width={width} height={height} role=img aria-label='{escape(title)}'>"]
    for i, column in enumerate(columns):
        out.append(f"<text x={LEFT + i * CELL_W + 2} y={TOP - 8}>{escape(_short(column))}</text>")
    for j, (row, cells) in enumerate(rows.items()):
        y = TOP + j * CELL_H
        out.append(f"<text x=0 y={y + 14}>{escape(row)}</text>")
        for i, column in enumerate(columns):
            site = cells.get(column)
            x = LEFT + i * CELL_W
            if site is None:
                out.append(f"<rect x={x} y={y} width={CELL_W - 3} height={CELL_H - 3} fill=none class=edge />")
                continue
            count = math.prod(site.shape) if site.shape else 0
            strength = 0.15 + 0.6 * (math.log1p(count) / top if top else 0)
            extra = added.get(site.role, 0)
            text = f"{site.role}: {' x '.join(map(str, site.shape))}" + (f", + {extra:,} parameters" if extra else "")
            out.append(
                f"<g><title>{escape(text)}</title><rect x={x} y={y} width={CELL_W - 3} height={CELL_H - 3} rx=3 "
                f"fill='#2457a6' fill-opacity={strength:.2f} />"
                + (f"<circle cx={x + CELL_W - 11} cy={y + 8} r=4 fill='#e08a1e' />" if extra else "")
                + "</g>"
            )
    out.append("</svg></figure>")
    return "".join(out)


def _pictures(base: Program, program: Program) -> str:
    grids = [_grid(p.anatomy.sites) for p in (base, program)]
    columns = list(dict.fromkeys(c for g in grids for row, cells in g.items() if row for c in cells))
    if not columns:
        return ""
    top = max(math.log1p(math.prod(s.shape)) for g in grids for cells in g.values() for s in cells.values() if s.shape)
    before = {a.module for a in base.attachments}
    added: dict[str, int] = {}
    for a in program.attachments:
        if a.module not in before:
            own = [t for t in a.tensors if t in program.weights]  # what several share is counted where it stands first
            added[a.site.role] = added.get(a.site.role, 0) + sum(math.prod(program.weights[t].shape) for t in own)
    return (
        "<h2>Anatomy</h2><p class=soft>Shade: parameters of the site, on a logarithmic scale. A dot: something was added there. "
        "An empty cell: the layer has no such site.</p><div class=pics>"
        + _picture("before", base, columns, top, {})
        + _picture("after", program, columns, top, added)
        + "</div>"
    )


def _ranks(program: Program) -> str:
    """A heat map of ranks (or widths) by layer and site, where something with a rank is attached."""
    table: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for a in program.attachments:
        params = a.method.params()
        value = params.get("rank", params.get("width"))
        if value is None:
            continue
        head, bracket, tail = a.site.role.rpartition("]")
        column = f"{tail.lstrip('.') or a.site.role} ({a.name})"
        columns[column] = None
        table.setdefault(head + bracket, {})[column] = f"{value}"
    if not table:
        return ""
    top = max(float(v) for cells in table.values() for v in cells.values())
    rows = []
    for row, cells in table.items():
        line = [escape(row or "model")]
        for c in columns:
            v = cells.get(c, "")
            shade = f"background:rgba(224,138,30,{0.15 + 0.55 * float(v) / top:.2f})" if v and top else ""
            line.append(f"<span style='display:block;{shade};padding:0 .4rem'>{v}</span>")
        rows.append(line)
    return "<h2>Ranks and widths</h2>" + _table(("", *columns), rows, tuple(range(1, len(columns) + 1)))


def _steps(plan: Plan) -> str:
    rows = []
    for s in plan.steps:
        doc = f"<p class=soft>{escape(s.doc)}</p>" if s.doc else ""
        names = ", ".join(group_roles([x.role for x in s.sites])) if s.sites else ""
        facts = "".join(f"<p class=soft>{escape(f)}</p>" for f in s.facts)
        rows.append(
            (
                str(s.span.line), f"{doc}<code>{escape(s.text)}</code>{facts}", escape(names), f"{sum(x.added for x in s.sites):,}",
                f"{sum(x.removed for x in s.sites):,}", f"{sum(x.trainable for x in s.sites):,}",
            )
        )  # fmt: skip
    return "<h2>Statements</h2>" + _table(("line", "statement", "sites", "added", "removed", "train"), rows, (3, 4, 5))


def _mark(ok: bool | None) -> str:
    return {True: "<span class=ok>ok</span>", False: "<span class=bad>failed</span>", None: "<span class=soft>not measured</span>"}[ok]


def _expectations(plan: Plan) -> str:
    if not plan.expectations:
        return ""
    rows = [(_mark(e.ok), f"<code>{escape(e.text)}</code>", escape(e.detail)) for e in plan.expectations]
    return "<h2>Expectations</h2>" + _table(("", "expected", "found"), rows)


def _certificates(certificates: Sequence[Mapping[str, Any]]) -> str:
    if not certificates:
        return ""
    rows = []
    for c in certificates:
        where = ", ".join(str(c[k]) for k in ("output", "case") if k in c) or ", ".join(c.get("samples", []))
        rows.append((_mark(c["ok"]), escape(str(c["claim"])), escape(where), f"{c['max_abs_error']:.3g}", f"{c['tolerance']:.3g}"))
    return "<h2>Certificates</h2><p class=soft>Largest absolute difference that was measured when this was compiled.</p>" + _table(
        ("", "claim", "where", "measured", "allowed"), rows, (3, 4)
    )


def _timings(rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    return (
        "<h2>Time</h2><p class=soft>Median of one call on the machine that compiled this, milliseconds; only this table differs between runs.</p>"
        + _table(head, [[escape(c) for c in row] for row in body], tuple(range(1, len(head))))
    )


def _fusions(outputs: Sequence[tuple[str, str, Any]]) -> str:
    """How often each rule fired in each fused output, and for each kind of near miss the first condition that failed."""
    rows = []
    for _, path, emitted in outputs:
        for entry in emitted.fusions:
            kinds: dict[str, list[Mapping[str, Any]]] = {}
            for miss in entry["misses"]:
                kinds.setdefault(str(miss["condition"]), []).append(miss)
            missed = "".join(
                f"<p class=soft>not at <code>{escape(str(group[0]['node_name']))}</code>"
                + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                + f": {escape(condition)}</p>"
                for condition, group in kinds.items()
            )
            if entry["fired"] or missed:
                rows.append((escape(path), f"<code>{escape(entry['rule'])}</code> {escape(entry['doc'])}", f"{entry['fired']}", missed))
    return "<h2>Fusions</h2>" + _table(("output", "rule", "fired", "near misses"), rows, (2,)) if rows else ""


def _outputs(outputs: Sequence[tuple[str, str, Any]]) -> str:
    if not outputs:
        return ""
    rows = [
        (escape(name), f"<code>{escape(path)}</code>", "".join(f"<p>{escape(n)}</p>" for n in emitted.notes))
        for name, path, emitted in outputs
    ]
    return "<h2>Outputs</h2>" + _table(("backend", "path", "notes"), rows)
