"""The verifier: a table of rules that a Program must satisfy after every pass.

A rule is a function from a program to the faults it finds, in words. A fault here is a fault of ours (S0902), never of the
spec: it names the pass that ran last so that the report is of use.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import fx

from surgery.core.diagnostics import SurgeryError, error
from surgery.core.source import Span
from surgery.model.cut_leaves import refit
from surgery.model.program import Program, ValueSpec

Rule = Callable[[Program], Iterable[str]]


def graph_modules(program: Program) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every GraphModule of the tree with its path, the root first; a shared one once."""
    for path, module in program.graph.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module


def well_formed(program: Program) -> Iterable[str]:
    """Graphs lint: arguments are defined before use, names are unique, one output."""
    for path, module in graph_modules(program):
        try:
            module.graph.lint()
        except RuntimeError as exc:
            yield f"graph `{path}`: {exc}"


def targets_exist(program: Program) -> Iterable[str]:
    """What a node calls or reads is there."""
    for path, module in graph_modules(program):
        for node in module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                try:
                    reduce(getattr, str(node.target).split("."), module)
                except AttributeError:
                    yield f"graph `{path}`: node {node.name} names {node.target}, which is not there"


def tensors_owned(program: Program) -> Iterable[str]:
    """Every parameter and buffer has one expression of its shape, and no expression is without a tensor."""
    there: dict[str, torch.Tensor] = dict(program.graph.named_parameters(remove_duplicate=False))
    there.update(program.graph.named_buffers(remove_duplicate=False))
    canonical = {program.aliases.get(name, name) for name in there}
    for name in sorted(canonical - set(program.weights)):
        yield f"tensor `{name}` has no expression"
    for name in program.weights:
        if name not in canonical:
            yield f"expression `{name}` belongs to no tensor of the graph"
        elif name in there and tuple(there[name].shape) != tuple(program.weights[name].shape):
            yield f"tensor `{name}` is {tuple(there[name].shape)}, its expression {tuple(program.weights[name].shape)}"


def no_accidental_aliases(program: Program) -> Iterable[str]:
    """One Parameter under two names must be a declared tie, and a declared tie must be one Parameter."""
    first: dict[int, str] = {}
    for name, parameter in program.graph.named_parameters(remove_duplicate=False):
        before = first.setdefault(id(parameter), name)
        if before != name and program.aliases.get(name, name) != program.aliases.get(before, before):
            yield f"`{name}` and `{before}` share a parameter without being tied"
    named = dict(program.graph.named_parameters(remove_duplicate=False))
    for alias, target in program.aliases.items():
        if alias in named and target in named and named[alias] is not named[target]:
            yield f"`{alias}` is tied to `{target}` but is a parameter of its own"


def attachments_live(program: Program) -> Iterable[str]:
    """What an attachment names is in the graph and in the weights."""
    for a in program.attachments:
        try:
            program.module(a.module)
            program.node(a.node)
        except (AttributeError, KeyError):
            yield f"attachment {a.module} of {a.origin.verb} {a.origin.method} is not in the graph"
        for name in a.tensors:
            if program.aliases.get(name, name) not in program.weights:
                yield f"attachment {a.module} names tensor `{name}`, which has no expression"


def frozen_known(program: Program) -> Iterable[str]:
    for name in sorted(program.frozen):
        if name not in program.weights:
            yield f"frozen name `{name}` is no tensor of the program"


def specs_present(program: Program) -> Iterable[str]:
    """Every value has a spec, so that costs and later passes can rely on them."""
    for path, module in graph_modules(program):
        for node in module.graph.nodes:
            if node.op != "output" and not isinstance(node.meta.get("spec"), (ValueSpec, tuple)):
                yield f"graph `{path}`: node {node.name} has no spec"


def leaves_fit(program: Program) -> Iterable[str]:
    """What a leaf module says of its sizes is what its tensors have: a stored program is built from the former."""
    for path, module in program.graph.named_modules():
        if isinstance(module, fx.GraphModule):
            continue  # a layer with a parameter of its own is no leaf, and a copy of it would take its graph over
        if next(iter(module._parameters.values()), None) is not None:
            fitted = copy.copy(module)
            refit(fitted)
            wrong = [k for k, v in fitted.__dict__.items() if isinstance(v, int) and module.__dict__.get(k) != v]
            if wrong:
                said = ", ".join(f"{k} = {module.__dict__.get(k)}, not {fitted.__dict__[k]}" for k in wrong)
                yield f"module `{path}` says {said}"


RULES: tuple[Rule, ...] = (
    well_formed, targets_exist, tensors_owned, no_accidental_aliases, attachments_live, frozen_known, specs_present, leaves_fit,
)  # fmt: skip


def verify(program: Program, after: str, span: Span | None = None) -> None:
    """Runs the table; raises S0902 naming ``after`` (the pass that ran last) and every fault found."""
    faults = [f"{rule.__name__}: {fault}" for rule in RULES for fault in rule(program)]
    if faults:
        raise SurgeryError(
            error(
                "S0902", f"the program is broken after {after}", span, notes=tuple(faults[:20]),
                help="this is a fault of surgery: please report it with the spec and the model's config",
            ),
            exit_code=2,
        )  # fmt: skip


def evaluate(shape: tuple[Any, ...], symbols: dict[str, int]) -> tuple[int, ...]:
    """A spec's shape at given sizes of its symbols."""
    out = []
    for n in shape:
        if hasattr(n, "free_symbols"):
            n = n.subs({s: symbols[str(s)] for s in n.free_symbols})
        out.append(operator.index(int(n)))
    return tuple(out)
