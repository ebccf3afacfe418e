"""Moving checkpoints into the order of a model's units, as a part of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.plan import group_roles, plural
from surgery.model.claims import Claim
from surgery.model.dims import Dims
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.model.running import outputs_of
from surgery.model.study import Study
from surgery.model.weights import Expr, is_float, select
from surgery.passes.kinds.drop_signature import leaves
from surgery.passes.kinds.match import Matching
from surgery.passes.kinds.match_axes import Plain, Unit, find_units, places, ranges
from surgery.passes.kinds.merge_finite import finite
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.operation import Resolved


def aligned(
    program: Program, op: Resolved, operands: Mapping[str, Operands], sources: Sequence[Source], axes: Sequence[str], sweeps: int, seed: int
) -> Mapping[str, Operands]:
    """The operands with every source but the program itself moved. Tells what moved and what could not; claims that no source computes anything
    else than before. While planning nothing moves. Raises S0799 where nothing could."""
    floating = [
        n for n in program.dims.parameters if n in program.weights and is_float(program.weights[n].dtype) and _fits(program, n, sources)
    ]
    found = find_units(program, floating, axes)
    for line in found.fixed:
        op.tell(line)
    if not found.units:
        raise fail(
            "S0799", "no units can change places here", op.origin.span, "nothing to match", notes=found.fixed[:4],
            help="name other `axes`, or leave them out",
        )  # fmt: skip
    op.tell("may change places: " + "; ".join(_described(found.units)))
    study = op.study
    if study is None:
        op.tell("compile reads the weights and finds the order")
        return operands
    out = dict(operands)
    for at, source in enumerate(sources):
        if source.own:
            continue
        units = find_units(program, floating, axes).units
        read = {n: source.expr(n, {}) for n in floating}
        matching = Matching(
            program.dims, program.aliases, floating, _reader(program.weights, study, "the model"), _reader(read, study, source.name), units,
            sweeps, seed, lambda done, total, name=source.name: study.progress(f"matching units of {name}", done, total),  # type: ignore[misc]
        )  # fmt: skip
        before = matching.distance(moved=False)
        matching.run()
        moved = {n: _moved(program.dims, n, e, units) for n, e in read.items()}
        op.tell(_result(source, matching, before))
        op.claim(_claim(program, source, read, moved, op))
        for name in out:
            if name in moved:
                experts = list(out[name].experts)
                experts[at] = moved[name]
                out[name] = replace(out[name], experts=tuple(experts))
    return out


def _reader(exprs: Mapping[str, Expr], study: Study, who: str) -> Callable[[str], Tensor]:
    """Reads tensors by name. What it gives raises S0798 for a tensor that is not finite: no assignment could be made of it."""

    def read(name: str) -> Tensor:
        value = realise(exprs[name], functions=study.tensors.functions)
        finite(value, name, who)
        return value

    return read


def _fits(program: Program, name: str, sources: Sequence[Source]) -> bool:
    """Whether a tensor is a parameter or a running statistic that every source has in this shape; others keep their axes where they are."""
    owner, _, leaf = name.rpartition(".")
    if leaf not in program.module(owner)._parameters and leaf not in ("running_mean", "running_var"):
        return False
    theirs = [s.weights.get(s.aliases.get(name, name)) for s in sources if not s.own]
    return all(e is not None and e.shape == program.weights[name].shape for e in theirs)


def _moved(dims: Dims, name: str, expr: Expr, units: Sequence[Unit]) -> Expr:
    for axis, expression in enumerate(dims.parameter(name)):
        expr = select(expr, axis, ranges(places(expression, units)))
    return expr


def _described(units: Sequence[Unit]) -> list[str]:
    groups: dict[tuple[str, int], list[str]] = {}
    for unit in units:
        if isinstance(unit, Plain):
            groups.setdefault((unit.what, unit.leaf.size), []).extend(unit.roles)
            continue
        inside = [
            w for w, leaf in (("query heads in their groups", unit.inner), ("values", unit.value), ("keys", unit.key)) if leaf is not None
        ]
        what = "heads" + (f" (and {', '.join(inside)} inside)" if inside else "")
        groups.setdefault((what, unit.groups.size), []).append(unit.role)
    return [f"{size} {what} of {', '.join(group_roles(roles)[:2])}" for (what, size), roles in groups.items()]


def _result(source: Source, matching: Matching, before: float) -> str:
    after = matching.distance(moved=True)
    aligned = matching.alignment()
    parts = [f"{source.name}: {plural(sum(u.moved for u in matching.units), 'unit')} moved in {plural(matching.done, 'sweep')}"]
    parts.append(f"distance {before:.4g} -> {after:.4g}")
    parts.append(
        f"alignment of singular vectors R {aligned[0]:.4f} -> {aligned[1]:.4f}"
        if aligned
        else "R not computed (the matrices are too large)"
    )
    return ", ".join(parts)


def _claim(program: Program, source: Source, read: Mapping[str, Expr], moved: Mapping[str, Expr], op: Resolved) -> Claim:
    """``moved = as it was``: the checkpoint's weights in either order in the program's graph. Its cache, whose heads changed places, is left out."""
    first, second = program.copy(), program.copy()
    first.weights.update(read)
    second.weights.update(moved)
    kinds = leaves(program.signature.out_spec)

    def computed(which: Program) -> Callable[[Tensors, Sequence[Tensor]], list[Tensor]]:
        run = outputs_of(which)

        def outputs(tensors: Tensors, flat: Sequence[Tensor]) -> list[Tensor]:
            found = run(tensors, flat)
            return found if len(found) != len(kinds) else [t for t, k in zip(found, kinds, strict=True) if k.kind != "cache"]

        return outputs

    text = f"{source.name} in the model's order = {source.name}"
    return Claim(text, first, computed(first), computed(second), tolerance=1e-4, span=op.origin.span)
