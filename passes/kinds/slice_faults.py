"""What can be wrong with a statement that removes units: every diagnostic of the kind ``slice``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.core import ast
from surgery.core.diagnostics import Diagnostic, Severity, SurgeryError, error, fail
from surgery.core.near import quoted
from surgery.core.plan import group_roles, plural
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.operation import Resolved

if TYPE_CHECKING:
    from surgery.passes.kinds.slice_targets import Target


def span_of(op: Resolved, name: str) -> Span:
    """Where the value of a parameter is written, else the statement."""
    call = op.statement.method if op.statement is not None else None
    for arg in call.args if call is not None else ():
        if arg.name == name and arg.value.span.end:
            return arg.value.span
    return op.origin.span


def selection(op: Resolved) -> Span:
    """The selectors of the statement."""
    chosen: Sequence[ast.Selector] = op.statement.selectors if op.statement is not None else ()
    spans = [s.span for s in chosen if s.span.end]
    return spans[0].to(spans[-1]) if spans else op.origin.span


def title(op: Resolved) -> str:
    return f"{op.verb} {op.method.name}"


def of(names: Sequence[str], most: int = 3) -> str:
    """Roles for a sentence: grouped, in backticks, the rest counted."""
    grouped = group_roles(list(names))
    more = [f"{len(grouped) - most} more"] if len(grouped) > most else []
    text = quoted(grouped[:most], "and") if not more else ", ".join(f"`{g}`" for g in grouped[:most])
    return f"{text} and {more[0]}" if more else text


# ---------------------------------------------------------------- parameters


def several_amounts(op: Resolved, given: Sequence[str]) -> SurgeryError:
    first, *others = given
    return fail(
        "S0272", f"{quoted(given, 'and')} both say how much `{title(op)}` removes", span_of(op, others[0]), "said again here",
        also=[(span_of(op, first), "said here")], help=f"keep one of {quoted(given, 'and')}",
    )  # fmt: skip


def no_amount(op: Resolved, noun: str) -> SurgeryError:
    name = op.method.name
    return fail(
        "S0273", f"`{title(op)}` does not say how much to remove", op.origin.span, "how much?",
        help=[
            f"write `{name}(ratio = 25%)` for a share, `{name}(keep = 8)` for the number of {noun}s that stay",
            f"or `{name}(to = 80%, of = params)` for the smallest cut after which that share of the model is left",
        ],
    )  # fmt: skip


def needs_data(op: Resolved, score: str) -> SurgeryError:
    return fail(
        "S0274", f"the score `{score}` is computed from data, and `{title(op)}` has no `using`", span_of(op, "score"), "needs data",
        help='define data, `data text = lines("calib.txt")`, and write `using text`; magnitude, l2, random and file need none',
    )  # fmt: skip


def unread_data(op: Resolved, score: str) -> SurgeryError:
    span = op.statement.using_span if op.statement is not None and op.statement.using_span.end else op.origin.span
    return fail(
        "S0275", f"the score `{score}` reads no data", span, "nothing looks at this",
        help="leave `using` out, or choose by taylor, fisher, wanda or activation",
    )  # fmt: skip


def file_parameter(op: Resolved, missing: bool) -> SurgeryError:
    if missing:
        return fail(
            "S0276", "`score = file` names no file", span_of(op, "score"), "which file?",
            help='write `score = file, scores = "heads.json"`',
        )  # fmt: skip
    return fail(
        "S0276", "`scores` names a file of scores, and `score` does not ask for one", span_of(op, "scores"), "nothing looks at this",
        help="write `score = file` too, or leave `scores` out",
    )  # fmt: skip


def unread_parameter(op: Resolved, name: str, why: str, help: str) -> SurgeryError:
    return fail("S0279", f"nothing of `{title(op)}` reads `{name}` here: {why}", span_of(op, name), "nothing looks at this", help=help)


def file_unreadable(op: Resolved, path: str, why: str) -> SurgeryError:
    return fail(
        "S0277", f"the scores in {path} cannot be read: {why}", span_of(op, "scores"), "read here",
        help="write one list of numbers for each selected site under its role, as JSON or as a safetensors file", exit_code=1,
    )  # fmt: skip


def file_vector(op: Resolved, path: str, message: str, help: str) -> SurgeryError:
    return fail("S0278", f"{path}: {message}", span_of(op, "scores"), "read here", help=help)


# ---------------------------------------------------------------- what is selected


def nothing_there(op: Resolved, noun: str, what: str, roles: Sequence[str], around: Sequence[str], anywhere: bool) -> SurgeryError:
    """No units of this kind in what is selected; ``around`` are blocks that the selected sites are parts of."""
    if around:
        help = f"{noun}s belong to the whole block: select {quoted(around[:3], 'and')}"
    elif anywhere:
        help = f"select {what}, for example with `[...]` for the layers that have it; `surgery show` lists the sites"
    else:
        help = f"this model has no {what} that surgery knows; `surgery show` lists its sites"
    return fail("S0440", f"there are no {noun}s in {of(roles)}", selection(op), f"no {what} here", help=help)


def without(op: Resolved, noun: str, what: str, site: Site) -> SurgeryError:
    """A block of the right kind that has no such units, with the reason where it is known."""
    if noun == "head" and site.heads == 1:
        return fail(
            "S0440", f"{of([site.role])} has one head, and nothing would be left of it", selection(op), "one head",
            help="select the blocks that have several, or take the whole block out with `skip bypass`",
        )  # fmt: skip
    if noun == "head" and site.facts.get("mixer"):
        return fail(
            "S0440", f"there are no heads in {of([site.role])}: each of its channels is mixed by itself", selection(op), "no heads here",
            help="`prune width` narrows the stream that it reads and writes; `skip bypass` takes the block out",
        )  # fmt: skip
    return nothing_there(op, noun, what, [site.role], [], True)


def only_outputs(op: Resolved, roles: Sequence[str]) -> SurgeryError:
    return fail(
        "S0441", f"every channel of {of(roles)} is fixed or an output of the model", selection(op), "fixed",
        help=f"to make an output narrower name its convolution: {quoted(group_roles(list(roles))[-1:], 'and')}",
    )  # fmt: skip


def left_whole(roles: Sequence[str]) -> str:
    """A line of the plan about convolutions that a selected region holds and that are left alone."""
    return f"left whole, as outputs of the model or fixed: {', '.join(group_roles(list(dict.fromkeys(roles)))[:4])}"


def fixed(op: Resolved, noun: str, target: Target, reason: str) -> SurgeryError:
    return fail(
        "S0441", f"the {noun}s of {target.name} cannot be removed: {reason}", selection(op), "fixed",
        help="`surgery show --dims` prints what goes together and why a size is fixed; select other sites",
    )  # fmt: skip


def empty(op: Resolved, noun: str, target: Target, kept: int, least: int, why: str, parameter: str) -> SurgeryError:
    label = f"{plural(kept, noun)} of {target.size}" if kept else "nothing is left"
    if why:
        message, help = f"{target.name} would keep {plural(kept, noun)}, and {why}", f"keep at least {plural(least, noun)}"
    else:
        message, help = f"nothing would be left of the {noun}s of {target.name}", "keep some; `prune layers` drops whole layers"
    return fail("S0442", message, span_of(op, parameter), label, help=help)


def too_many(op: Resolved, program: Program, noun: str, target: Target, keep: int, tensors: Sequence[str]) -> SurgeryError:
    """More are to be kept than there are; when an earlier statement took some, it is shown."""
    also = earlier(program, op, tensors)
    return fail(
        "S0443", f"{target.name} has {plural(target.size, noun)}, not {keep}", span_of(op, "keep"), f"keeps {keep}",
        also=[(selection(op), f"has {plural(target.size, noun)} here"), *also],
        help=f"keep at most {target.size}" + (", or remove fewer above" if also else ""),
    )  # fmt: skip


def earlier(program: Program, op: Resolved, tensors: Sequence[str]) -> list[tuple[Span, str]]:
    """The last statement above that changed the structure of some tensors, as a secondary label."""
    for name in tensors:
        for origin in reversed(program.journal.of(name)):
            if origin.span.end and origin.verb in ("prune", "share", "convert", "skip") and origin.span != op.origin.span:
                return [(origin.span, f"changed by `{origin.verb} {origin.method}` here")]
    return []


def grouping(op: Resolved, target: Target, kept: int, parameter: str) -> SurgeryError:
    """The number of query heads does not divide among the key-value groups."""
    groups, each = target.units.step, target.units.inner.size
    low = kept // groups * groups
    equal = [n for n in (low, low + groups) if groups <= n < target.size] or [target.size]
    whole = [n for n in (kept // each, kept // each + 1) if 1 <= n < groups] or [groups]
    where = target.name
    return fail(
        "S0444", f"{kept} query heads of {where} cannot be shared out equally among {groups} key-value groups", span_of(op, parameter),
        f"keeps {kept} of {target.size}",
        notes=[f"each group of {where} has {each} query heads, and all groups must keep as many"],
        help=[
            f"the same number in each group: {' or '.join(f'`prune heads(keep = {n})`' for n in equal)}",
            f"whole groups with their {each} heads: {' or '.join(f'`prune kv_groups(keep = {n})`' for n in whole)}",
        ],
    )  # fmt: skip


def half_selected(
    op: Resolved, program: Program, noun: str, target: Target, others: Sequence[str], tensors: Sequence[str], kept: bool, alone: bool
) -> SurgeryError:
    """Parts that share a class are one decision, and the statement names some of them only. ``alone``: the parameter of that name would
    make them independent."""
    roles = [s.role for s in target.sites]
    shared = [o for name in tensors for o in reversed(program.journal.of(name)) if o.verb == "share" and o.span.end]
    also = [(shared[0].span, "shared by this statement")] if shared else []
    held = "`keep` holds back" if kept else "not selected:"
    every = group_roles(sorted([*roles, *others], key=_natural))
    return fail(
        "S0445", f"{of(roles)} {'have' if len(roles) > 1 else 'has'} the same {noun}s as {of(others)}: they go together or not at all",
        selection(op), f"{held} {of(others)}", also=also,
        help=[
            f"select all of them, {quoted(every[:3], 'and')}, or none",
            *([f"or write `{op.method.name}(..., alone = true)`: what is selected gets {noun}s of its own"] if alone and not shared else []),
        ],
    )  # fmt: skip


def _natural(role: str) -> list[object]:
    head, _, tail = role.partition("[")
    number, _, rest = tail.partition("]")
    return [head, int(number) if number.isdigit() else -1, rest]


def disagree(op: Resolved, noun: str, target: Target, parameter: str, values: Mapping[str, object]) -> SurgeryError:
    shown = ", ".join(f"{v} for {quoted(group_roles([r]), 'and')}" for r, v in list(values.items())[:3])
    return fail(
        "S0446", f"the {noun}s of {target.name} are the same in all of these parts, and `{parameter}` has several values for them",
        span_of(op, parameter), "one decision", notes=[f"{parameter}: {shown}"], help=f"give one value of `{parameter}` for all of them",
    )  # fmt: skip


def unreachable(op: Resolved, quantity: str, least: int, limit: float, whole: int, share: float) -> SurgeryError:
    return fail(
        "S0447", f"no cut of what is selected leaves {share:.4g}% of the {quantity}", span_of(op, "to"), f"at most {limit:,.0f} {quantity}",
        notes=[f"the largest possible cut leaves {least:,} of {whole:,} {quantity}, {100 * least / whole:.4g}%"],
        help="select more, allow more, or prune something else first",
    )  # fmt: skip


def keeps_nothing_back(op: Resolved, roles: Sequence[str]) -> SurgeryError:
    span = op.statement.keep[0].span if op.statement is not None and op.statement.keep else op.origin.span
    return fail(
        "S0448", f"`keep` holds back {of(roles)}, which is not selected", span, "nothing to hold back here",
        help="leave the clause out, or select what it names",
    )  # fmt: skip


def all_kept(op: Resolved) -> SurgeryError:
    span = op.statement.keep[0].span if op.statement is not None and op.statement.keep else op.origin.span
    return fail("S0448", "`keep` holds back everything that is selected", span, "nothing is left to prune", help="hold back less")


def without_score(op: Resolved, noun: str, target: Target, score: str) -> SurgeryError:
    """The score says nothing of any tensor that the units are part of, so that they would go by their index."""
    return fail(
        "S0453", f"the score `{score}` says nothing of the {noun}s of {target.name}", span_of(op, "score"), "no order",
        notes=["no stored tensor that such a unit is part of has this score along it; they would go by their number"],
        help="choose by magnitude, taylor or a file of scores" if score in ("wanda", "activation") else "choose by a file of scores",
    )  # fmt: skip


def not_finite(op: Resolved, name: str, what: str) -> SurgeryError:
    return fail(
        "S0451", f"{what} of the tensor {name} are not finite: they have no order", op.origin.span, f"chosen by `{op.method.params()['score']}`",
        help="look at the checkpoint: NaN and infinity in weights or gradients spread to every output",
    )  # fmt: skip


# ---------------------------------------------------------------- warnings


def no_change(op: Resolved, noun: str, targets: Sequence[Target], parameter: str) -> Diagnostic:
    names = [s.role for t in targets for s in t.sites]
    where = f" of {of(names)}" if names else ""
    return error(
        "S0449", f"no {noun}{where} is removed: the cut is smaller than one step", span_of(op, parameter), "too small",
        notes=[f"there are {', '.join(str(n) for n in sorted({t.size for t in targets}))} {noun}s"],
        help=f"raise `{parameter}`, or leave these parts out", severity=Severity.WARNING,
    )  # fmt: skip


def no_faster(
    op: Resolved, noun: str, roles: Sequence[str], before: int, after: int, multiple: int, slower: bool, saved: str
) -> Diagnostic:
    """``slower``: the kept size fills as many blocks of ``multiple`` as the old one did."""
    gain = "so nothing gets faster" if slower else "so the last block is computed in part for nothing"
    up = -(-after // multiple) * multiple
    return error(
        "S0450", f"{of(roles)} {'go' if len(roles) > 1 else 'goes'} from {before} to {after} columns, which is no multiple of {multiple}: {gain}",
        selection(op), "kernels compute whole blocks", notes=[saved],
        help=f"keep {up if not slower else up - multiple or up}, or write `round_to = {multiple}`", severity=Severity.WARNING,
    )  # fmt: skip


def interface(op: Resolved, noun: str, before: int, after: int) -> Diagnostic:
    return error(
        "S0452", f"an output of the model goes from {before} to {after} {noun}s", op.origin.span, "changes what the model returns",
        help="whatever reads the output must expect the new size; this is as meant when the model is an encoder",
        severity=Severity.WARNING,
    )  # fmt: skip
