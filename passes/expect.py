"""Quantities that ``expect`` compares: each gives a number and the arithmetic behind it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgery.core.site import Site
from surgery.model import cost
from surgery.model.program import Program
from surgery.passes.portions import attached_to, count, portions

__all__ = ["COMPARE", "Quantity", "attached_to", "measure", "parameter_sizes"]

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
    every = parameter_sizes(program)
    parts: dict[str, torch.Tensor | None]
    if name:
        chosen = [a for a in program.attachments if a.name == name]
        made = [s for s in program.anatomy.sites if s.role in program.named.get(name, ())]
        if sites is not None:  # `on` narrows what `for` names
            regions = tuple(s.role for s in sites)
            chosen = [a for a in chosen if any(f"{a.site.role}.{a.name}.".startswith((r + ".", r + "[")) for r in regions)]
            made = [s for s in made if any(f"{s.role}.".startswith((r + ".", r + "[")) for r in regions)]
        added = {t for a in program.attachments for t in a.tensors}
        parts = {t: mask for t, mask in portions(program, made, every).items() if t not in added}
        parts |= {t: None for a in chosen for t in a.tensors if t in every}
        spots: Sequence[Site] = list({s.role: s for s in (*made, *(a.site for a in chosen))}.values())
    elif sites is not None:
        parts, spots = portions(program, sites, every), sites
    else:
        parts, spots = dict.fromkeys(every), program.anatomy.sites
    sizes = {n: count(mask, program.weights[n].shape) for n, mask in parts.items()}
    return QUANTITIES[quantity](Scope(program, sizes, parts, spots, sites is None and not name, read))


@dataclass(frozen=True)
class Scope:
    """What is measured: the elements of each parameter as a number (``sizes``) and as a mask (``parts``, None: all of it), the sites,
    and whether that is the ``whole`` model."""

    program: Program
    sizes: dict[str, int]
    parts: dict[str, torch.Tensor | None]
    spots: Sequence[Site]
    whole: bool
    read: Callable[[str], torch.Tensor] | None


def _terms(program: Program, sizes: dict[str, int]) -> tuple[tuple[str, float], ...]:
    """Sums by what a reader would name: the tensors of one added module together, layers of a stack together."""
    added = {t: a.module for a in program.attachments for t in a.tensors}
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        pattern = ".".join("*" if part.isdigit() else part for part in added.get(name, name).split("."))
        totals[pattern] = totals.get(pattern, 0) + size
    return tuple(sorted(totals.items(), key=lambda kv: -kv[1]))


Measure = Callable[[Scope], Quantity]


def _params(scope: Scope) -> Quantity:
    return Quantity(sum(scope.sizes.values()), _terms(scope.program, scope.sizes) if not scope.whole else ())


def _trainable(scope: Scope) -> Quantity:
    train = {n: c for n, c in scope.sizes.items() if n not in scope.program.frozen}
    return Quantity(sum(train.values()), _terms(scope.program, train))


def _active(scope: Scope) -> Quantity:
    if scope.whole:
        return Quantity(cost.active_parameters(scope.program))
    idle = cost.idle_shares(scope.program)
    active = {n: round(c * (1 - idle.get(n, 0.0))) for n, c in scope.sizes.items()}
    return Quantity(sum(active.values()), _terms(scope.program, active))


def _bytes(scope: Scope) -> Quantity:
    width = {n: getattr(torch, scope.program.weights[n].dtype).itemsize for n in scope.sizes}
    each = {n: c * width[n] for n, c in scope.sizes.items()}
    return Quantity(sum(each.values()), _terms(scope.program, each))


def _flops(scope: Scope) -> Quantity:
    if scope.whole:
        return Quantity(cost.flops_per_token(scope.program))
    return Quantity(cost.flops_of_sites(scope.program, scope.spots))


def _layers(scope: Scope) -> Quantity:
    if scope.whole:
        terms = tuple((s.name, float(s.layers)) for s in scope.program.anatomy.stacks)
        return Quantity(sum(n for _, n in terms), terms)
    return Quantity(len({(s.stack, s.layer) for s in scope.spots if s.layer is not None}))


def _heads(scope: Scope) -> Quantity:
    blocks = [s for s in scope.program.anatomy.sites if s.is_region and s.heads]
    if not scope.whole:
        roles = {s.role for s in scope.spots}
        blocks = [b for b in blocks if b.role in roles or any(b.role.startswith(r + ".") or r.startswith(b.role + ".") for r in roles)]
    per = {b.role: float(b.heads or 0) for b in blocks}
    return Quantity(sum(per.values()), tuple((r, n) for r, n in per.items()))


def _sparsity(scope: Scope) -> Quantity:
    if scope.read is None:
        return Quantity(None)
    zeros = total = 0
    added = set() if scope.whole else {t for a in scope.program.attachments for t in a.tensors}
    own = [n for n in scope.parts if n not in added]  # of a site its weight, not what is attached there, unless that is what was asked for
    for name in own or scope.parts:
        mask = scope.parts[name]
        if len(scope.program.weights[name].shape) < 2:
            continue  # a mask never covers biases and norms: they would only dilute the share
        zero = scope.read(name) == 0
        zeros += int((zero if mask is None else zero & mask).sum())
        total += scope.sizes[name]
    return Quantity(zeros / total if total else 0.0, ((f"{zeros:,} zeros of {total:,} weights", zeros / total if total else 0.0),))


def _sites(scope: Scope) -> Quantity:
    return Quantity(len(scope.spots), tuple((s.role, 1.0) for s in scope.spots) if len(scope.spots) <= 4 else ())


QUANTITIES: dict[str, Measure] = {
    "params": _params, "trainable": _trainable, "active_params": _active, "bytes": _bytes, "flops": _flops,
    "layers": _layers, "heads": _heads, "sparsity": _sparsity, "sites": _sites,
}  # fmt: skip
