"""How many of the selected parts go, and which: amounts, scores, files, runs of neighbours."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.near import quoted
from surgery.core.plan import group_roles, plural
from surgery.core.site import NodeRef, Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.kinds.attach import seed_of
from surgery.passes.kinds.drop_extract import is_layer
from surgery.passes.kinds.drop_graph import branch_cut
from surgery.passes.kinds.drop_latent import distances
from surgery.passes.operation import Resolved

FROM_DATA = ("block_influence", "angular", "latent_distance")
FROM_WEIGHTS = ("magnitude",)


def span_of(op: Resolved, name: str) -> Span:
    """Where the value of a parameter is written, else the statement."""
    call = op.statement.method if op.statement is not None else None
    for arg in call.args if call is not None else ():
        if arg.name == name and arg.value.span.end:
            return arg.value.span
    return op.origin.span


# ------------------------------------------------------------------ how many


def amount(op: Resolved, every: bool) -> int | None:
    """How many of the selected parts go; None where no amount is given and ``every`` allows that (then all go).

    Raises S0272 for two amounts, S0273 for none, S0476 where none or all would go.
    """
    params = op.method.params()
    given = [name for name in ("count", "ratio", "keep") if params.get(name) is not None]
    label, total = f"{op.verb} {op.method.name}", len(op.sites)
    if len(given) > 1:
        raise fail(
            "S0272", f"{quoted(given, 'and')} both say how much `{label}` removes", span_of(op, given[1]), "said again here",
            also=[(span_of(op, given[0]), "said here")], help=f"keep one of {quoted(given, 'and')}",
        )  # fmt: skip
    if not given:
        if every:
            return None
        raise fail(
            "S0273", f"`{label}` does not say how much to remove", op.origin.span, "how much?",
            help=f"write `{op.method.name}(count = 2)`, `{op.method.name}(ratio = 25%)` or `{op.method.name}(keep = 8)`; "
            "`skip bypass` takes out exactly what is selected",
        )  # fmt: skip
    name = given[0]
    value = params[name]
    gone = {
        "count": lambda: int(value), "ratio": lambda: int(Decimal(str(value)) * total), "keep": lambda: total - int(value),
    }[name]()  # fmt: skip
    if not 0 < gone <= total:
        says = "nothing would go" if gone <= 0 else f"only {total} are selected"
        raise fail(
            "S0476", f"`{name} = {_shown(name, value)}` of {plural(total, 'selected part')}: {says}", span_of(op, name), says,
            help=f"one of {total} is {100 / total:.4g}%" if name == "ratio" else f"give a number from 1 to {total - 1}",
        )  # fmt: skip
    return gone


def _shown(name: str, value: Any) -> str:
    return f"{100 * value:g}%" if name == "ratio" else str(value)


# ------------------------------------------------------------------ which


def choose(program: Program, op: Resolved, free: Sequence[Site], gone: int) -> tuple[list[Site], str]:
    """``gone`` of the sites ``free`` (in model order), and a remark for the plan.

    Scores need weights or data, which ``plan`` does not read: it takes the first ones and says so.
    """
    params = op.method.params()
    score, together = params["score"], bool(params.get("contiguous")) or params["score"] == "angular"
    _data_fits(op, score)
    file = _file(op, score)
    if op.study is None and score in (*FROM_DATA, *FROM_WEIGHTS):
        first = _run(free, [0.0] * len(free), gone, op) if together else list(free[:gone])
        return first, f"compile decides by {score} which of them; counted as if it were the first"
    if score == "angular":
        chosen, value = _angular(program, op, free, gone)
        return chosen, f"lowest angular distance {value:.4g}"
    scores = _scores(program, op, free, score, file)
    for site, value in zip(free, scores, strict=True):
        if not math.isfinite(value):
            raise fail(
                "S0479", f"the score of {site.role} is not a finite number: {value}", span_of(op, "scores" if file else "score"), "no order",
                help=f"give a finite number for it in {params['scores']}" if file
                else "weights or data lead to NaN or infinity here: look at the checkpoint and the samples, or choose by `random` or a file",
            )  # fmt: skip
    if together:
        chosen = _run(free, scores, gone, op)
    else:
        ranked = sorted(range(len(free)), key=lambda i: (scores[i], i))[:gone]
        chosen = [free[i] for i in sorted(ranked)]
    values = dict(zip((s.role for s in free), scores, strict=True))
    shown = ", ".join(f"{s.role} {values[s.role]:.4g}" for s in chosen[:6]) + (" ..." if len(chosen) > 6 else "")
    return chosen, f"{score.replace('_', ' ')}: {shown}"


def _data_fits(op: Resolved, score: str) -> None:
    using = op.statement.using if op.statement is not None else ""
    if score in FROM_DATA and not using and op.data is None:
        raise fail(
            "S0274", f"the score `{score}` is computed from data, and `{op.verb} {op.method.name}` has no `using`", span_of(op, "score"),
            "needs data", help='define data, `data text = lines("calib.txt")`, and write `using text`; magnitude, random and file need none',
        )  # fmt: skip
    if score not in FROM_DATA and using:
        assert op.statement is not None
        raise fail(
            "S0275", f"the score `{score}` reads no data", op.statement.using_span if op.statement.using_span.end else op.origin.span,
            "nothing looks at this", help="leave `using` out, or choose by block_influence",
        )  # fmt: skip


def _run(free: Sequence[Site], scores: Sequence[float], gone: int, op: Resolved) -> list[Site]:
    """The ``gone`` neighbours in one stack with the lowest sum; the first of equals."""
    best: tuple[float, int] | None = None
    for i in range(len(free) - gone + 1):
        window = free[i : i + gone]
        if not _neighbours(window):
            continue
        total = math.fsum(scores[i : i + gone])
        if best is None or total < best[0]:
            best = total, i
    if best is None:
        raise _no_run(op, gone, free)
    return list(free[best[1] : best[1] + gone])


def _neighbours(window: Sequence[Site]) -> bool:
    return all(
        a.stack == b.stack and a.layer is not None and b.layer == a.layer + 1 for a, b in itertools.pairwise(window)
    )  # fmt: skip


def _no_run(op: Resolved, gone: int, free: Sequence[Site]) -> SurgeryError:
    names = group_roles([s.role for s in free])
    return fail(
        "S0476", f"there are no {gone} layers in a row among those that may go: {quoted(names[:4], 'and')}", span_of(op, "contiguous"),
        "asks for neighbours", help="drop fewer, keep fewer back, or leave `contiguous` out",
    )  # fmt: skip


def _scores(program: Program, op: Resolved, free: Sequence[Site], score: str, file: dict[str, float]) -> list[float]:
    if score == "file":
        return [file[s.role] for s in free]
    if score == "random":
        return [seed_of(op.seed, op.name, s.role) / 2**63 for s in free]
    assert op.study is not None
    if score == "latent_distance":
        return distances(program, op, free)
    if score == "magnitude":
        return [_magnitude(program, op, s) for s in free]
    from surgery.model.scores import layer_scores

    return list(layer_scores(op.study, program, op.data, [_stream(program, op, s) for s in free]))


def _stream(program: Program, op: Resolved, site: Site) -> Site:
    """What a part changes is the stream: a layer from its input to its output, a branch from in front of the sum to behind it."""
    if is_layer(site):
        return site
    cut = branch_cut(program, site, op.origin.span)
    return replace(site, input=NodeRef(cut.graph, cut.instead.name), output=NodeRef(cut.graph, cut.node.name))


def _magnitude(program: Program, op: Resolved, site: Site) -> float:
    """Sum of the absolute values of all parameters inside, in float64."""
    assert op.study is not None
    names = dict.fromkeys(program.aliases.get(n, n) for n in site.parameters)
    return math.fsum(float(op.study.tensor(program, n).double().abs().sum()) for n in names)


def _angular(program: Program, op: Resolved, free: Sequence[Site], gone: int) -> tuple[list[Site], float]:
    """The run of ``gone`` neighbours between whose first input and last output the angle at the last token is smallest."""
    from surgery.model.scores import run_scores

    branch = next((s.role for s in free if not is_layer(s)), "")
    if branch:
        raise fail(
            "S0475", f"{branch} is no whole layer, and `angular` compares what enters and leaves runs of layers", span_of(op, "score"),
            "for layers", help="choose blocks by block_influence",
        )  # fmt: skip
    assert op.study is not None
    angles = run_scores(op.study, program, op.data, list(free), gone) if gone <= len(free) else []
    runs = [(angle, i) for i, angle in enumerate(angles) if _neighbours(free[i : i + gone])]
    if not runs:
        raise _no_run(op, gone, free)
    angle, first = min(runs)
    return list(free[first : first + gone]), angle


# ------------------------------------------------------------------ scores from a file


def _file(op: Resolved, score: str) -> dict[str, float]:
    """The numbers of ``scores = "file.json"`` by role. Raises S0276 to S0278 for what is not there or not numbers."""
    path = op.method.params().get("scores")
    if score != "file":
        if path:
            raise fail(
                "S0276", "`scores` names a file of scores, and `score` does not ask for one", span_of(op, "scores"), "nothing looks at this",
                help="write `score = file` too, or leave `scores` out",
            )  # fmt: skip
        return {}
    if not path:
        raise fail(
            "S0276",
            "`score = file` names no file",
            span_of(op, "score"),
            "which file?",
            help='write `score = file, scores = "layers.json"`',
        )
    where = Path(op.origin.span.source.name).parent / path
    try:
        data = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError) as why:
        raise _unreadable(op, path, str(getattr(why, "strerror", None) or why)) from None
    if not isinstance(data, dict) or any(not isinstance(v, int | float) or isinstance(v, bool) for v in data.values()):
        raise _unreadable(op, path, "it is no object of numbers by role")
    missing = [s.role for s in op.sites if s.role not in data]
    if missing:
        raise fail(
            "S0278", f"{path} has no score for {quoted(group_roles(missing)[:3], 'and')}", span_of(op, "scores"), "read here",
            help="give one number for each selected part under its role, as `surgery select` prints them",
        )  # fmt: skip
    unread = group_roles(sorted(set(data) - {s.role for s in op.sites}))
    if unread:
        op.tell(f"{path} also has scores of parts that this statement does not choose from: {quoted(unread[:3], 'and')}")
    return {k: float(v) for k, v in data.items()}


def _unreadable(op: Resolved, path: str, why: str) -> SurgeryError:
    return fail(
        "S0277", f"the scores in {path} cannot be read: {why}", span_of(op, "scores"), "read here",
        help='write a JSON object with one number for each part, `{"layers[0]": 0.31, "layers[1]": 0.07}`',
    )  # fmt: skip
