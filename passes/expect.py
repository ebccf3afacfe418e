"""Quantities that ``expect`` compares: each gives a number and the arithmetic behind it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from surgery.core.site import Site
from surgery.model import cost
from surgery.model.program import Attachment, Program

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A measured quantity. ``value`` is None when it needs the weights; ``terms`` are (what, amount) whose sum it is."""

    value: float | None
    terms: tuple[tuple[str, float], ...] = ()

    @property
    def arithmetic(self) -> str:
        """``73,728 = 36,864 (layers[0..5].attn.q.lora) + ...``, at most four terms."""
        if self.value is None:
            return "known when the weights are"
        shown = " + ".join(f"{_number(n)} ({what})" for what, n in self.terms[:4])
        rest = self.terms[4:]
        more = f" + {_number(sum(n for _, n in rest))} ({len(rest)} more)" if rest else ""
        return f"{_number(self.value)}" + (f" = {shown}{more}" if shown else "")


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def parameter_sizes(program: Program) -> dict[str, int]:
    """Number of elements of each parameter, tied names once, in model order."""
    names = dict.fromkeys(program.aliases.get(n, n) for n, _ in program.graph.named_parameters(remove_duplicate=False))
    return {n: math.prod(program.weights[n].shape) for n in names}


def sizes_of(program: Program, sites: Iterable[Site]) -> dict[str, int]:
    """Elements of each parameter that belong to the sites: their own (a slice counts its rows) and what is attached there."""
    every = parameter_sizes(program)
    out: dict[str, int] = {}
    rows: dict[str, set[tuple[int, int]]] = {}
    for site in sites:
        if site.is_region:
            names: Sequence[str] = site.parameters
        else:
            names = [n for n in (site.weight, site.bias) if n] or list(site.parameters)
        for name in names:
            name = program.aliases.get(name, name)
            if name not in every:
                continue
            if site.rows and name == site.weight:
                rows.setdefault(name, set()).update(site.rows)
                length = sum(b - a for a, b in rows[name])
                out[name] = max(out.get(name, 0), every[name] // program.weights[name].shape[site.out_axis] * length)
            elif site.rows and name == site.bias:
                rows.setdefault(name, set()).update(site.rows)
                out[name] = sum(b - a for a, b in rows[name])
            else:
                out[name] = every[name]
        for a in attached_to(program, site):
            out |= {t: every[t] for t in a.tensors if t in every}
    return out


def attached_to(program: Program, site: Site) -> list[Attachment]:
    """Attachments on the site itself or, for a region, on anything inside it."""
    inside = (site.role + ".", site.role + "[")
    return [a for a in program.attachments if a.site.role == site.role or (site.is_region and a.site.role.startswith(inside))]


def measure(
    program: Program,
    quantity: str,
    sites: Sequence[Site] | None = None,
    name: str = "",
    *,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Quantity:
    """The value of ``quantity`` for the model, for ``sites`` or for what the statement named ``name`` added.

    ``read`` realises a tensor by name; without it ``sparsity`` has no value. Raises KeyError for an unknown quantity.
    """
    if name:
        chosen = [a for a in program.attachments if a.name == name]
        if sites is not None:  # `on` narrows what `for` names
            regions = tuple(s.role for s in sites)
            chosen = [a for a in chosen if any(f"{a.site.role}.{a.name}.".startswith((r + ".", r + "[")) for r in regions)]
        every = parameter_sizes(program)
        sizes = {t: every[t] for a in chosen for t in a.tensors if t in every}
        spots: Sequence[Site] = list({a.site.role: a.site for a in chosen}.values())
    elif sites is not None:
        sizes, spots = sizes_of(program, sites), sites
    else:
        sizes, spots = parameter_sizes(program), program.anatomy.sites
    return QUANTITIES[quantity](program, sizes, spots, sites is None and not name, read)


def _terms(program: Program, sizes: dict[str, int]) -> tuple[tuple[str, float], ...]:
    """Sums by what a reader would name: the tensors of one added module together, layers of a stack together."""
    added = {t: a.module for a in program.attachments for t in a.tensors}
    totals: dict[str, int] = {}
    for name, count in sizes.items():
        pattern = ".".join("*" if part.isdigit() else part for part in added.get(name, name).split("."))
        totals[pattern] = totals.get(pattern, 0) + count
    return tuple(sorted(totals.items(), key=lambda kv: -kv[1]))


Measure = Callable[[Program, dict[str, int], Sequence[Site], bool, "Callable[[str], torch.Tensor] | None"], Quantity]


def _params(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    return Quantity(sum(sizes.values()), _terms(program, sizes) if not whole else ())


def _trainable(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    train = {n: c for n, c in sizes.items() if n not in program.frozen}
    return Quantity(sum(train.values()), _terms(program, train))


def _active(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    if whole:
        return Quantity(cost.active_parameters(program))
    idle = cost.idle_shares(program)
    active = {n: round(c * (1 - idle.get(n, 0.0))) for n, c in sizes.items()}
    return Quantity(sum(active.values()), _terms(program, active))


def _bytes(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    width = {n: getattr(torch, program.weights[n].dtype).itemsize for n in sizes}
    each = {n: c * width[n] for n, c in sizes.items()}
    return Quantity(sum(each.values()), _terms(program, each))


def _flops(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    if whole:
        return Quantity(cost.flops_per_token(program))
    return Quantity(cost.flops_of_sites(program, spots))


def _layers(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    if whole:
        terms = tuple((s.name, float(s.layers)) for s in program.anatomy.stacks)
        return Quantity(sum(n for _, n in terms), terms)
    return Quantity(len({(s.stack, s.layer) for s in spots if s.layer is not None}))


def _heads(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    blocks = [s for s in program.anatomy.sites if s.is_region and s.heads]
    if not whole:
        roles = {s.role for s in spots}
        blocks = [b for b in blocks if b.role in roles or any(b.role.startswith(r + ".") or r.startswith(b.role + ".") for r in roles)]
    per = {b.role: float(b.heads or 0) for b in blocks}
    return Quantity(sum(per.values()), tuple((r, n) for r, n in per.items()))


def _sparsity(
    program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: Callable[[str], torch.Tensor] | None
) -> Quantity:
    if read is None:
        return Quantity(None)
    zeros = total = 0
    for name in sizes:
        if len(program.weights[name].shape) < 2:
            continue  # a mask never covers biases and norms: they would only dilute the share
        tensor = read(name)
        zeros += int((tensor == 0).sum())
        total += tensor.numel()
    return Quantity(zeros / total if total else 0.0, ((f"{zeros:,} zeros of {total:,} weights", zeros / total if total else 0.0),))


def _sites(program: Program, sizes: dict[str, int], spots: Sequence[Site], whole: bool, read: object) -> Quantity:
    return Quantity(len(spots), tuple((s.role, 1.0) for s in spots) if len(spots) <= 4 else ())


QUANTITIES: dict[str, Measure] = {
    "params": _params, "trainable": _trainable, "active_params": _active, "bytes": _bytes, "flops": _flops,
    "layers": _layers, "heads": _heads, "sparsity": _sparsity, "sites": _sites,
}  # fmt: skip
