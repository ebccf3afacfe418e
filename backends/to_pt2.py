"""The pt2 backend: one AOTInductor package for serving, with open batch and length, and a measured certificate inside."""

from __future__ import annotations

import itertools
import operator
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from surgery.backends import aoti, onnx_cut, served
from surgery.backends.fuse.engine import fuse
from surgery.backends.fuse.rule import Target
from surgery.backends.onnx_certify import cases
from surgery.backends.onnx_export import output_names
from surgery.backends.onnx_faults import half_chooses
from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.core.diagnostics import SurgeryError, error, fail
from surgery.core.progress import report
from surgery.core.source import Span
from surgery.model.atomic import AtomicOutput
from surgery.model.live import live_root
from surgery.model.program import Program
from surgery.model.pytree import Tree
from surgery.model.retarget import retarget
from surgery.model.sample import placeholders, sample_inputs

PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Allowed difference to torch in the same precision, times the output's scale when that is above one."""

BATCH, LENGTH = 8, 127
"""Of the example that is traced. Weights are packed for products of so many rows; what suits many rows was measured to suit few as well."""

RECURRENCES = "surgery.model.recurrence"
"""The module with the only operations that packages call in Python."""

STEPS = 4
"""Of one emission: compiling, packing, measuring, writing."""


def wrapped(root: fx.GraphModule, inputs: Tree, outputs: Tree) -> nn.Module:
    """A root graph that is called as the original is, by keyword, and gives plain containers (see :func:`surgery.backends.served.nest`).

    A graph of its own and not a function over keywords, because ``torch.export`` reads the names off the signature.
    """
    graph = fx.Graph()
    leaves: list[fx.Node] = []
    for name, tree in zip(inputs["keys"], inputs["items"], strict=True):
        if tree["type"] != "const":
            leaves += _leaves(graph, graph.placeholder(name), tree)
    found = graph.call_module("root", tuple(leaves))
    single = not isinstance(next(n for n in root.graph.nodes if n.op == "output").args[0], (tuple, list))
    parts = (found if single else graph.call_function(operator.getitem, (found, i)) for i in itertools.count())
    graph.output(served.nest(parts, outputs))
    # only the written function is kept: exported as a graph, its dicts would become torch.fx's own immutable kind
    made: nn.Module = type("Served", (nn.Module,), {"forward": type(fx.GraphModule({"root": root}, graph)).forward})()
    made.root = root
    return made


def _leaves(graph: fx.Graph, value: fx.Node, tree: Tree) -> list[fx.Node]:
    """The tensors inside an input, in the order of the tree."""
    if tree["type"] == "tensor":
        return [value]

    def item(of: fx.Node, key: Any) -> fx.Node:
        return graph.call_function(operator.getitem, (of, key))

    if tree["type"] == "cache":
        layers = [item(value, i) for i in range(tree["layers"])]
        return [item(layer, column) for column in range(served.columns(tree)) for layer in layers]
    keys = tree.get("keys") or range(len(tree["items"]))
    return [
        leaf
        for key, sub in zip(keys, tree["items"], strict=True)
        if sub["type"] != "const"
        for leaf in _leaves(graph, item(value, key), sub)
    ]


class Pt2Backend:
    """Fuses, compiles for this machine's processor, packs, measures, then writes one file whole or not at all."""

    name = "pt2"
    folds = True

    def plan(self, program: Program, params: Mapping[str, Any], live: frozenset[str], span: Span | None) -> Iterable[str]:
        """What the plan says of the statement."""
        if onnx_cut.has_cache(program) and params.get("cache") is False:
            yield "without the cache: whole sequences go in, no keys and values come out"
        yield "compiled for the processor of the machine that runs `compile`"

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``precision`` (fp32, fp16, bf16), ``target`` (cpu, cuda), ``cache``, ``optimize``.

        Raises S0890 without a compiler, S0891 without the target, S0892 and S0893 when the graph cannot be compiled or exported, S0894 when the
        certificate fails, S0876 for a cache that the model does not have, S0801 to S0805 for the file. Nothing is written then.
        """
        target = str(request.params.get("target") or "cpu")
        precision = str(request.params.get("precision") or "fp32")
        aoti.require_compiler(target, request.span)
        aoti.ask_ahead()
        program = cached_as_asked(program, request.params.get("cache"), request.span)
        root = live_root(program, request.tensors, dtype=PRECISION[precision]).eval()
        root.requires_grad_(False)
        names = output_names(program, _outputs(root))
        measured = cases(program, root, PRECISION[precision])
        fused = None
        if request.params.get("optimize", "all") in ("all", None, True):
            fused = fuse(program, root, Target(backend="pt2", device=target, precision=precision))
        record = served.record(program, names) | {
            "precision": precision, "target": target, "call": {"inputs": served.input_tree(program), "outputs": program.signature.out_spec},
            "fusions": fused.record() if fused else [], "spec": request.spec_digest,
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="surgery-pt2-") as folder:
            place = Path(folder)
            report("emitting pt2: compiling", 0, STEPS)
            python: list[str] = []
            files = compiled(program, on_device(fused.graph if fused else root, target), place, target, span=request.span, python=python)
            with AtomicOutput(request.target, folder=False, force=request.force, own=lambda p: owns(p, request.spec_digest)) as temporary:
                report("emitting pt2: packing", 1, STEPS)
                aoti.package(files, temporary)
                (place / "model.pt2").symlink_to(temporary.absolute())  # torch opens files of this name only
                report("emitting pt2: measuring torch against the package", 2, STEPS)
                if target != "cpu":
                    aoti.try_apart(place / "model.pt2", [RECURRENCES] if python else [], request.span)
                run = flat_run(aoti.load(place / "model.pt2"), program, target)
                certificates = served.measure(measured, run, names, claim="torch = pt2", tolerance=TOLERANCE[precision])
                bad = [c for c in certificates if not c["ok"]]
                if bad:
                    raise SurgeryError(
                        error(
                            "S0894", "the compiled package does not compute what the module computes", request.span, "asked for here",
                            notes=[f"{c['output']} on {c['case']} input: error {c['max_abs_error']:.3g}, allowed {c['tolerance']:.3g}" for c in bad],
                            help=["nothing was written", *chosen] if (chosen := half_chooses(root, precision))
                            else "nothing was written; please report this with the model's config and `g++ --version`",
                        )
                    )  # fmt: skip
                report("emitting pt2: writing", 3, STEPS)
                record["certificates"] = [*request.certificates, *certificates]
                aoti.mark(temporary, record)
        call = ", ".join(
            f"{n}=..."
            for n, item in zip(record["call"]["inputs"]["keys"], program.signature.in_spec["items"], strict=True)
            if item["type"] != "const"
        )
        told = [f'torch._inductor.aoti_load_package("{request.target.name}")({call})', *(fused.summary() if fused else [])]
        if python:
            told.insert(1, f"`import {RECURRENCES}` comes first: {', '.join(python)} is written in Python")
        notes = [f"{request.target.name}: {line}" for line in told]
        return Emitted((request.target,), tuple(certificates), tuple(notes), tuple(record["fusions"]))


def cached_as_asked(program: Program, cache: Any, span: Span | None) -> Program:
    """The program with its cache, or for ``cache = false`` without. Raises S0876 where it has none or cannot do without."""
    has = onnx_cut.has_cache(program)
    if cache and not has:
        family = program.info.family or program.info.architecture or "this model"
        raise fail("S0876", f"{family} has no cache of keys and values to give", span, "asked for here", help="leave `cache` out")
    if cache is not False or not has:
        return program
    try:
        return onnx_cut.without_cache(program)
    except onnx_cut.NotCut as exc:
        raise fail(
            "S0876", f"this model cannot be written without its cache: {exc}", span, "asked for here", help="leave `cache = false` out"
        ) from exc


def compiled(
    program: Program,
    root: fx.GraphModule,
    place: Path,
    target: str = "cpu",
    *,
    options: Mapping[str, Any] | None = None,
    span: Span | None = None,
    python: list[str] | None = None,
) -> list[Path]:
    """The files of the package of a root graph, made in the folder ``place``. Batch, length and past stay open. ``python``: as :func:`aoti.build` has it."""
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    tree = served.input_tree(program)
    example = sample_inputs(program, batch=BATCH, length=LENGTH, seed=1, padding=False, dtype=dtype, past=5)
    axes = [
        {i: torch.export.Dim.DYNAMIC for i, n in enumerate(s.shape) if getattr(n, "free_symbols", None)} or None
        for _, s in placeholders(program)
    ]
    nested = served.nest(iter([t.to(target) for t in example]), tree)
    shapes = served.nest(iter(axes), tree)
    module = wrapped(root, tree, program.signature.out_spec)
    return aoti.build(module, nested, shapes, place / "build", options=dict(options or {}), span=span, python=python)


def flat_run(package: Callable[..., Any], program: Program, target: str) -> Callable[[list[torch.Tensor]], Sequence[Any]]:
    """The package with the flat inputs and outputs of the program's graph."""
    tree, out = served.input_tree(program), program.signature.out_spec

    def run(inputs: list[torch.Tensor]) -> Sequence[Any]:
        return [t.cpu() for t in served.flat(package(**served.nest(iter([t.to(target) for t in inputs]), tree)), out)]

    return run


def on_device(root: fx.GraphModule, target: str) -> fx.GraphModule:
    """A root graph, fused or not, with its tensors and the devices that it names moved to ``target``, in place. Graphs are fused and measured in
    main memory, so that every target has the same graph and the package is held against another processor's numbers."""
    if target == "cpu":
        return root
    retarget(root, device=target)
    for node in root.graph.find_nodes(op="get_attr"):
        path, _, leaf = str(node.target).rpartition(".")
        owner = root.get_submodule(path)
        value = getattr(owner, leaf)
        if isinstance(value, torch.Tensor) and leaf not in owner._parameters and leaf not in owner._buffers:
            setattr(owner, leaf, value.to(target))
    return root.to(target)


def _outputs(root: fx.GraphModule) -> int:
    found = next(n for n in root.graph.nodes if n.op == "output").args[0]
    return len(found) if isinstance(found, (tuple, list)) else 1


BACKEND = Pt2Backend()
