"""Kind ``state``: which parameters train. Nothing in the graph changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds import attach
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class StateMethod(Method):
    """Base of the methods that choose parameters by name and place and let them train or not.

    ``sets`` is what the chosen parameters become. ``exclusive`` methods freeze the base first, as adapters do.
    """

    kind: ClassVar[str] = "state"
    identity: ClassVar[str] = "exact"
    sets: ClassVar[Literal["frozen", "trainable"]] = "frozen"
    exclusive: ClassVar[bool] = False
    attachments: ClassVar[bool] = True
    missing: ClassVar[tuple[str, str]] = ("no parameter", "select a layer, a block or a site that has parameters")
    """What was not found and what to do, for the error when nothing is chosen."""

    def chooses(self, name: str, norm: bool) -> bool:
        """Whether the parameter ``name`` is meant; ``norm`` says that it belongs to a normalisation."""
        raise NotImplementedError


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Set the chosen parameters of every selected site. Raises S0370 when there is none, S0472 for a part of a stored tensor."""
    method = op.method
    assert isinstance(method, StateMethod)
    if method.exclusive:
        attach.freeze_base(program)
    norms = norm_parameters(program)
    added: dict[str, Site] = {}
    if method.attachments:
        added = {t: a.site for a in attach.attachments_of(program, op) for t in a.tensors if trains(program, t)}
    if not op.sites:
        own = attach.base_parameters(program)
        return [_set(program, op, None, [n for n in (*own, *added) if method.chooses(n, n in norms)])]
    slices = _whole_slices(program, op)
    changes, found = [], False
    for site, each in zip(op.sites, op.methods, strict=True):
        assert isinstance(each, StateMethod)
        names = [program.aliases.get(n, n) for n in parameters_of(site)]
        if site.op == "attachment":
            names = [n for n in site.parameters if trains(program, n)]
        else:
            names += [t for t, own in added.items() if _within(site, own)]
        names = [n for n in dict.fromkeys(names) if n in program.weights and each.chooses(n, n in norms)]
        for name in names:
            if site.rows and name in (site.weight, site.bias) and name not in slices:
                raise fail(
                    "S0472", f"{site.role} is a part of the stored tensor {name}, which {op.verb}s as a whole or not at all",
                    op.origin.span, "a part is selected", help="select every part of it, or the whole block",
                )  # fmt: skip
        found = found or bool(names)
        changes.append(_set(program, op, site, names))
    if not found:
        raise attach.no_site(op, *method.missing)
    return changes


def _set(program: Program, op: Resolved, site: Site | None, names: list[str]) -> SiteChange:
    method = op.method
    assert isinstance(method, StateMethod)
    if site is None and not names:
        raise attach.no_site(op, *method.missing)
    for name in names:
        (program.frozen.add if method.sets == "frozen" else program.frozen.discard)(name)
        program.journal.record(name, op.origin)
    own = list(dict.fromkeys([*(parameters_of(site) if site else ()), *names]))
    trainable = sum(_numel(program, n) for n in own if program.aliases.get(n, n) not in program.frozen)
    note = f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {method.sets}"
    if site is None:
        return SiteChange("", "", trainable=trainable, note=note)
    return SiteChange(site.role, site.path, site.rows, site.shape, site.shape, trainable=trainable, note=note)


def parameters_of(site: Site) -> list[str]:
    names = list(site.parameters) if site.is_region or site.op == "attachment" else [site.weight, site.bias]
    return [n for n in dict.fromkeys((*names, *site.parameters)) if n]


def norm_parameters(program: Program) -> set[str]:
    """Parameters of normalisations, by the sites that are norms and by the class of the module that holds them."""
    found = {n for s in program.anatomy.sites if s.op == "norm" for n in (s.weight, s.bias, *s.parameters) if n}
    for path, module in program.graph.named_modules():
        if "Norm" in type(module).__name__:
            found.update(attach.join(path, n) for n, _ in module.named_parameters(recurse=False))
    return found


def trains(program: Program, name: str) -> bool:
    """Whether a tensor of an attachment is a parameter that its method trains (buffers and fixed tensors never change state)."""
    owner, _, leaf = name.rpartition(".")
    module = program.module(owner)
    if leaf not in module._parameters:
        return False
    method, site = getattr(module, "method", None), getattr(module, "site", None)
    if method is not None and hasattr(method, "tensors"):  # a graph that was read back does not say it of its parameters
        return any(s.name == leaf and s.trainable for s in method.tensors(site))
    return bool(module._parameters[leaf].requires_grad)  # type: ignore[union-attr]


def _within(site: Site, own: Site) -> bool:
    """Whether an attachment's site is the selected one or inside it."""
    if own.role == site.role or own.role.startswith(site.role + "."):
        return True
    return site.is_region and bool(own.weight) and own.weight in site.parameters


def _whole_slices(program: Program, op: Resolved) -> set[str]:
    """Stored tensors all of whose rows are selected by the statement."""
    rows: dict[str, int] = {}
    for s in op.sites:
        for name in (s.weight, s.bias) if s.rows else ():
            rows[name] = rows.get(name, 0) + sum(hi - lo for lo, hi in s.rows)
    axes = {s.weight: s.out_axis for s in op.sites if s.rows} | {s.bias: -1 for s in op.sites if s.rows}
    return {n for n, total in rows.items() if n in program.weights and total >= program.weights[n].shape[axes[n]]}


def _numel(program: Program, name: str) -> int:
    size = 1
    for n in program.weights[program.aliases.get(name, name)].shape:
        size *= n
    return size
