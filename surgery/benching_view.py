"""What ``surgery bench`` measured, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.benching_ideal import Ideal

if TYPE_CHECKING:
    from surgery.benching import Benched


def as_json(b: Benched) -> dict[str, Any]:
    """Schema ``surgery.bench/1``."""
    found: dict[str, Any] = {
        "schema": "surgery.bench/1",
        "threads": b.threads,
        "rounds": b.rounds,
        "arms": [
            {
                "name": a.name, "source": a.source, "kind": a.kind, "params": a.record.get("params"), "bytes": a.record.get("bytes"),
                "peak_mib": b.memory.get(a.name), "ideal": _ideal_json(b.ideal.get(a.name)),
            }
            for a in b.arms
        ],
        "shapes": [
            {
                "batch": batch, "length": length, "best": b.best((batch, length)), "best_artifact": b.best((batch, length), given=True),
                "arms": [
                    {
                        "name": a.name, "median_ms": 1e3 * cell.timing.median, "low_ms": 1e3 * cell.timing.low, "high_ms": 1e3 * cell.timing.high,
                        "flops": cell.flops, "flops_per_second": cell.rate, "max_abs_difference": cell.error,
                    }
                    for a in b.arms
                    for cell in (cells[a.name],)
                ],
            }
            for (batch, length), cells in b.cells.items()
        ],
        "left_out": [{"what": k, "why": v} for k, v in b.left_out.items()],
    }  # fmt: skip
    return found


def _ideal_json(ideal: Ideal | None) -> dict[str, Any] | None:
    if ideal is None:
        return None
    return {
        "first_token_ms": {str(p): 1e3 * t for p, t in ideal.table.items()},
        "token_ms": None if ideal.step is None else 1e3 * ideal.step,
        "r2": ideal.r2,
    }


def as_text(b: Benched) -> str:
    lines = [f"{len(b.arms)} arms, {b.threads} threads, {b.rounds} rounds in turns; medians, the spread is that of the middle half"]
    for shape, cells in b.cells.items():
        lines += ["", f"batch {shape[0]}, length {shape[1]}"]
        fastest = cells[b.best(shape)].timing.median
        rows = [("arm", "ms", "spread", "x best", "GFLOP", "GFLOP/s", "weights MiB", "peak MiB", "difference")]
        for a in b.arms:
            cell, size = cells[a.name], a.record.get("bytes")
            rows.append(
                (
                    a.name, f"{1e3 * cell.timing.median:.2f}", f"{100 * cell.timing.spread:.0f} %", f"{cell.timing.median / fastest:.2f}",
                    _short(cell.flops), _short(cell.rate), _number(size, 1 << 20, 1), _number(b.memory.get(a.name), 1, 0),
                    "" if cell.error is None else f"{cell.error:.1e}",
                )
            )  # fmt: skip
        lines += table(rows)
        own = b.best(shape, given=True)
        lines.append(f"  best artifact: {own}" + ("" if own == b.best(shape) else f" (faster still: {b.best(shape)})"))
    if b.ideal:
        lines += ["", *_ideal_text(b)]
    if b.left_out:
        lines += ["", "left out:", *(f"  {what}: {why}" for what, why in b.left_out.items())]
    return "\n".join(lines) + "\n"


def _ideal_text(b: Benched) -> list[str]:
    prompts = sorted({p for i in b.ideal.values() for p in i.table})
    rows = [("arm", *(f"F({p})" for p in prompts), "g", "R2")]
    for name, ideal in b.ideal.items():
        firsts = [f"{1e3 * ideal.table[p]:.2f}" if p in ideal.table else "" for p in prompts]
        rows.append((name, *firsts, "" if ideal.step is None else f"{1e3 * ideal.step:.2f}", "" if ideal.r2 is None else f"{ideal.r2:.3f}"))
    return [
        "idealised runtime at batch 1, ms: F(p) reads p tokens and gives the first, g each further one; T(p, o) = F(p) + g (o - 1)",
        *table(rows),
    ]


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns in line, the first to the left, the others to the right; columns that hold nothing are left out."""
    keep = [i for i in range(len(rows[0])) if i == 0 or any(r[i] for r in rows[1:])]
    widths = [max(len(r[i]) for r in rows) for i in keep]
    return ["  " + "  ".join(r[i].ljust(w) if i == 0 else r[i].rjust(w) for i, w in zip(keep, widths, strict=True)).rstrip() for r in rows]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _short(value: float | None) -> str:
    """Thousands of millions with three digits."""
    return "" if value is None else f"{value / 1e9:.3g}"
