"""Kind ``slice``: whole units of the model's structure go; what is left is a smaller model of the same form.

A method of this kind says what its units are; how many go, which, what goes with them and what the plan says of it stand here. All
units of a statement go in one cut (:func:`surgery.model.cut.cut`), which compile proves equal to the model with the units masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import Method, param
from surgery.core.site import Site
from surgery.model.claims import Claim
from surgery.model.cut import cut
from surgery.model.cut_sizes import NewSizes
from surgery.model.decouple import pick_counted
from surgery.model.oracle import masked_claim, outputs_of
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds import slice_report as report
from surgery.passes.kinds.slice_budget import Budget
from surgery.passes.kinds.slice_choice import Counts, Ranked, by_layer, chosen, group_of, over_all, to_budget
from surgery.passes.kinds.slice_scores import DATA, unit_scores
from surgery.passes.kinds.slice_targets import Target, Units, collect, outside, regions, same_everywhere
from surgery.passes.operation import Resolved, SiteChange

Found = list[tuple[int, Site, Units]]
"""What a statement selects: the number of the selected site, the block, its units."""


@dataclass(frozen=True)
class SliceMethod(Method):
    """Base of the methods that remove units. A subclass names the unit and finds the units of a block."""

    kind: ClassVar[str] = "slice"
    fold_class: ClassVar[str] = "slice"
    identity: ClassVar[str] = "changed"
    takes_data: ClassVar[bool] = True
    one_of: ClassVar[tuple[str, ...]] = ("ratio", "keep", "to")
    noun: ClassVar[str] = "unit"
    """What one unit is called."""
    block: ClassVar[str] = "block"
    """What holds the units, for messages."""
    columns: ClassVar[bool] = True
    """Units are rows or columns of matrices, so that kernels favour multiples of 8."""
    together: ClassVar[bool] = True
    """Blocks that share their units must be selected together."""

    ratio: float | None = param(None, "share of the units of each site that goes", min=0, max=1, unit="%", per_layer=True)
    keep: int | None = param(None, "number of units that each site keeps", min=1, max=10**9, per_layer=True)
    to: float | None = param(
        None, "share of the model before the spec that may be left: the smallest cut that reaches it", min=0, max=1, unit="%"
    )
    of: Literal["params", "bytes", "flops"] = param("params", "what `to` is a share of; flops are per token")
    scope: Literal["layer", "global"] = param("layer", "each site loses its own share, or the lowest scores of all sites go")
    normalize: Literal["mean", "max", "none"] = param("mean", "what a site's scores are divided by before sites compete (scope = global)")
    round_to: int = param(1, "the units that stay are rounded up to a multiple of this", min=1, max=65536)
    score: Literal["magnitude", "l2", "random", "taylor", "taylor_signed", "taylor_mix", "fisher", "wanda", "activation", "file"] = param(
        "magnitude", "what a unit is worth; the lowest go"
    )
    scores: str | None = param(None, "file with a list of scores for each site (score = file)")
    seed: int = param(0, "seed of the random choice (score = random)", min=0, max=2**63 - 1)

    def prepare(self, program: Program, op: Resolved) -> None:
        """What must be changed, without an effect on any output, before units are looked for. Nothing by default."""

    def fits(self, site: Site) -> bool:
        """Whether a region is a block that may have such units."""
        raise NotImplementedError

    def units(self, program: Program, site: Site) -> Units | None:
        """The units of a block; None when it has none."""
        raise NotImplementedError

    def find(self, program: Program, op: Resolved) -> Found:
        """(number of the selected site, block, units) of everything selected. Raises S0440 for a site without such units."""
        found = []
        for at, site in regions(program, op, self.fits, self.noun, self.block):
            units = self.units(program, site)
            if units is None:
                raise faults.without(op, self.noun, self.block, site)
            found.append((at, site, units))
        return found


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Find, count, choose, cut. Raises S0272..S0279 for parameters, S0440..S0451 for what is selected, S0453 for scores;
    nothing has been cut then."""
    method = op.method
    assert isinstance(method, SliceMethod)
    _parameters(op, method)
    found = _loosen(program, op, method)
    analysed = program.dims
    method.prepare(program, op)
    targets = _targets(program, op, method, found if program.dims is analysed else method.find(program, op))
    scores = unit_scores(program, op, targets)
    ranked = [Ranked.of(t, None if scores is None else scores[i]) for i, t in enumerate(targets)]
    counts = _counts(program, op, method, targets, ranked, scores is not None)
    _report_small(op, method, targets, counts)
    if not any(counts):
        return report.unchanged(program, targets)
    group = group_of(program.dims, targets, ranked, counts)
    widths = report.widths(program, op, method, targets, counts)
    before = report.Costs(program)
    owners = report.sizes_before(program, targets)
    sizes = NewSizes(group.dims, group.keep)
    earlier = program.copy() if op.study is not None else None
    result = cut(program, group, op.origin, sizes)
    if earlier is not None:
        op.claim(masked_claim(earlier, group, program.copy(), op.origin.span))
    after = before.after(program, sizes)
    report.warn_widths(op, method, widths, before, after)
    picked = [chosen(t, r, c) for t, r, c in zip(targets, ranked, counts, strict=True)] if scores is not None else None
    report.tell(op, method, targets, counts, picked, before, after)
    return _changes(program, op, targets, counts, report.removed_by(targets, result, owners))


def _parameters(op: Resolved, method: SliceMethod) -> None:
    """The rules between the parameters, which the checker cannot know."""
    given = [n for n in ("ratio", "keep", "to") if any(m.params()[n] is not None for m in op.methods)]
    if len(given) > 1:
        raise faults.several_amounts(op, given)
    if not given:
        raise faults.no_amount(op, method.noun)
    using = bool(op.data is not None or (op.statement is not None and op.statement.using))
    if method.score in DATA and not using:
        raise faults.needs_data(op, method.score)
    if method.score not in DATA and using:
        raise faults.unread_data(op, method.score)
    if (method.score == "file") != (method.scores is not None):
        raise faults.file_parameter(op, method.scores is None)
    if method.to is None and method.of != "params":
        raise faults.unread_parameter(op, "of", "it says what `to` is a share of", "write `to = 80%` for a budget, or leave `of` out")
    if method.scope != "global" and method.normalize != "mean":
        why = "it says how scores of different sites compare"
        raise faults.unread_parameter(op, "normalize", why, "write `scope = global`, or leave `normalize` out")


def _loosen(program: Program, op: Resolved, method: SliceMethod) -> Found:
    """What the method finds. Units along which the graph counts numbers, such as the slopes of ALiBi, may go once the numbers are picked by
    an index."""
    found = method.find(program, op)
    held = [leaf for _, _, units in found for leaf in units.leaves if not leaf.free]
    if not held:
        return found
    before = program.copy() if op.study is not None else None
    if not pick_counted(program, list(dict.fromkeys(held)), op.origin):
        return found
    op.tell(f"numbers that the model counts along {method.noun}s are picked by an index")
    if before is not None:
        after = program.copy()
        op.claim(Claim("picked = counted", before, outputs_of(before), outputs_of(after), tolerance=0.0, span=op.origin.span))
    return method.find(program, op)


def _targets(program: Program, op: Resolved, method: SliceMethod, found: Found) -> list[Target]:
    """The decisions of the statement, those that `keep` holds back left out."""
    held = {s.role for s in op.keep}
    kept = [(at, s, u) for at, s, u in found if any(outside(s.role, role) for role in held)]
    if op.keep:
        idle = [role for role in held if not any(outside(s.role, role) for _, s, _ in found)]
        if idle:
            raise faults.keeps_nothing_back(op, sorted(idle))
        if len(kept) == len(found):
            raise faults.all_kept(op)
    back = {s.role for _, s, _ in kept}
    targets = collect([f for f in found if f[1].role not in back])
    for target in targets:
        for leaf in target.units.leaves:
            if not leaf.free:
                raise faults.fixed(op, method.noun, target, leaf.reason)
    if method.together:
        same_everywhere(program, op, targets, method.fits, method.units, back, method.noun, method.params().get("alone") is False)
    return targets


def _counts(
    program: Program, op: Resolved, method: SliceMethod, targets: Sequence[Target], ranked: Sequence[Ranked], scored: bool
) -> Counts:
    if method.to is not None:
        budget = Budget(program, op, targets, ranked, method.of)
        counts = to_budget(op, targets, ranked if scored else None, budget.left, budget.limit(method.to))
        if counts is None:
            raise faults.unreachable(op, method.of, budget.least(), budget.limit(method.to), budget.whole, 100 * method.to)
        op.tell(budget.text(counts, method.to))
        return counts
    if method.scope == "global":
        return over_all(program, op, targets, ranked if scored else None, method.noun)
    return by_layer(program, op, targets, method.noun)


def _report_small(op: Resolved, method: SliceMethod, targets: Sequence[Target], counts: Counts) -> None:
    parameter = next(n for n in ("ratio", "keep", "to") if method.params()[n] is not None)
    idle = [t for t, c in zip(targets, counts, strict=True) if not c]
    if idle and (method.scope == "layer" or len(idle) == len(targets)):
        op.warn(faults.no_change(op, method.noun, idle, parameter))


def _changes(program: Program, op: Resolved, targets: Sequence[Target], counts: Counts, removed: Sequence[int]) -> list[SiteChange]:
    """One entry a site; what a decision removed stands at the first of the sites that share it."""
    changes: list[SiteChange] = []
    seen: set[str] = set()
    for target, count, gone in zip(targets, counts, removed, strict=True):
        after = target.size - count * target.units.step
        if not target.sites:
            changes.append(SiteChange("", "", (), (target.size,), (after,), removed=gone))
        for i, site in enumerate(target.sites):
            trainable = report.trains(program, site, seen)
            changes.append(SiteChange(site.role, site.path, (), (target.size,), (after,), removed=0 if i else gone, trainable=trainable))
    return changes
