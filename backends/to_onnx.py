"""The onnx backend: graphs with dynamic axes, the original tensor names, and measured certificates inside."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.backends import onnx_cut, onnx_faults, onnx_files, onnx_int8, onnx_live, onnx_opset, onnx_steps, served
from surgery.backends.fuse import Target, fuse
from surgery.backends.fuse.engine import FUSIONS
from surgery.backends.fuse.ops import translations as fused_translations
from surgery.backends.onnx_certify import CASES as CASES
from surgery.backends.onnx_certify import LOSS, TOLERANCE, Case, cases, certify, chained, dtype_of, feeds_of, loss, swaps
from surgery.backends.onnx_complex import real_numbers
from surgery.backends.onnx_decoder import cached_pair
from surgery.backends.onnx_export import STEPS, export
from surgery.backends.onnx_run import as_numpy as as_numpy
from surgery.backends.onnx_run import checked_session
from surgery.backends.onnx_run import session as session
from surgery.backends.protocol import EmitRequest, Emitted
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.progress import report
from surgery.core.source import Span
from surgery.model.live import live_root
from surgery.model.program import Program

PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""The type that torch computes in while a graph of this precision is made."""


def require_onnx(span: Span | None = None) -> None:
    """Raises S0840 when the onnx extra is not installed."""
    missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
    if missing:
        raise fail(
            "S0840", f"emitting onnx needs {', '.join(missing)}", span, "asked for here",
            help="pip install 'model-surgery[onnx]'", exit_code=2,
        )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The parameters of the statement."""

    opset: int = 20
    precision: str = "fp32"
    target: str = "cpu"
    cache: bool | None = None
    optimize: bool = True

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Options:
        known = {k: v for k, v in params.items() if v is not None}
        return cls(
            int(known.get("opset", 20)), str(known.get("precision", "fp32")), str(known.get("target", "cpu")), known.get("cache"),
            known.get("optimize", "all") in ("all", True),
        )  # fmt: skip


@dataclass
class Graph:
    """One graph on its way to a file: ``part`` is "" or ``encoder``, ``decoder``; ``program`` is what it computes."""

    part: str
    program: Program
    model: Any = None
    run: Any = None
    packed: onnx_files.Packed | None = None
    certificates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fusions: list[dict[str, Any]] = field(default_factory=list)


class OnnxBackend:
    """Exports, cleans, checks and certifies, then writes: one file, or for an encoder and its decoder two (each with one more when its weights are large)."""

    name = "onnx"
    folds = True

    def plan(self, program: Program, params: Mapping[str, Any], live: frozenset[str], span: Span | None) -> Iterable[str]:
        """What the plan says of the statement. Raises S0876 for a cache that the model does not have."""
        options = Options.of(params)
        cached = onnx_cut.has_cache(program)
        facts = []
        if onnx_cut.is_pair(program):
            facts += _pair_facts(program, options, span)
        elif options.cache and not cached:
            raise onnx_faults.no_cache(program, span)
        if cached and options.cache is False:
            facts.append("without the cache: whole sequences go in, no keys and values come out")
        if options.precision == "int8":
            facts.append("int8: constant matrices of products, by column; embeddings, norms and biases stay fp32")
        if params.get("live"):
            count = len(onnx_live.held(program, live))
            facts.append(
                f"{count} adapter{'' if count == 1 else 's'} live: inputs with the emitted values, exchanged in a session"
                if count
                else "live: nothing is attached"
            )
        return facts

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``opset``, ``precision`` (fp32, fp16, bf16, int8), ``target``, ``cache``, ``optimize``; ``request.live`` names the modules that
        stay exchangeable.

        Raises S0840 without the extra, S0841 when a graph cannot be expressed in ONNX, S0842 when it computes something else, S0871 to S0878 for
        what the options ask and the graph cannot give, S0801 to S0805 for the target. Nothing is written then.
        """
        require_onnx(request.span)
        options = Options.of(request.params)
        onnx_opset.check_new(options.opset, request.span)
        whole = _cached_as_asked(program, options, request.span)
        graphs = _graphs(whole, options, request.span)
        paths = onnx_files.parts_of(request.target, [g.part for g in graphs])
        onnx_files.check_free(paths, request)
        for graph in graphs:
            _make(graph, request, options)
        shared = _together(program, whole, graphs, request, options)
        for graph in graphs:
            metadata(graph.model, "surgery.certificate", json.dumps([*request.certificates, *graph.certificates, *shared], sort_keys=True))
            metadata(graph.model, "surgery.spec", request.spec_digest)
            metadata(
                graph.model,
                "surgery.served",
                json.dumps(served.record(graph.program, [o.name for o in graph.model.graph.output]), sort_keys=True),
            )
        report("emitting onnx: writing", 5, STEPS)
        notes = [line for g, path in zip(graphs, paths, strict=True) for line in _told(g, path, options)]
        written = onnx_files.write([(path, g.model, g.packed) for g, path in zip(graphs, paths, strict=True)], request)
        return Emitted(
            tuple(written),
            tuple([c for g in graphs for c in g.certificates] + shared),
            tuple(notes),
            tuple(f for g in graphs for f in g.fusions),
        )


BACKEND = OnnxBackend()


def metadata(model: Any, key: str, value: str) -> None:
    """One entry of a model's metadata, replaced where it is there."""
    entry = next((p for p in model.metadata_props if p.key == key), None) or model.metadata_props.add()
    entry.key, entry.value = key, value


# ------------------------------------------------------------------ which graphs


def _cached_as_asked(program: Program, options: Options, span: Span | None) -> Program:
    """The program with or without its cache. Raises S0876."""
    cached = onnx_cut.has_cache(program)
    if options.cache and not cached and not onnx_cut.is_pair(program):
        raise onnx_faults.no_cache(program, span)
    if options.cache is not False or not cached:
        return program
    try:
        return onnx_cut.without_cache(program)
    except onnx_cut.NotCut as exc:
        raise fail(
            "S0876", f"this model cannot be written without its cache: {exc}", span, "asked for here", help="leave `cache = false` out"
        ) from exc


def _graphs(program: Program, options: Options, span: Span | None) -> list[Graph]:
    """One graph, or two of an encoder and a decoder; a pair whose parts cannot be told apart stays one and says so.

    Raises S0876 for a cache that is asked for and that the decoder cannot have.
    """
    if not onnx_cut.is_pair(program):
        return [Graph("", program)]
    notes = []
    if options.cache is not False:
        try:
            encoder, decoder = cached_pair(program)
            return [Graph("encoder", encoder), Graph("decoder", decoder)]
        except onnx_cut.NotCut as exc:
            if options.cache:
                raise onnx_faults.no_decoder_cache(program, str(exc), span) from exc
            notes.append(f"no cache: {exc}")
    try:
        encoder, decoder = onnx_cut.split(program)
    except onnx_cut.NotCut as exc:
        return [Graph("", program, notes=[*notes, f"encoder and decoder are one graph: {exc}"])]
    return [Graph("encoder", encoder), Graph("decoder", decoder, notes=notes)]


def _pair_facts(program: Program, options: Options, span: Span | None) -> list[str]:
    """What the plan says of an encoder and a decoder. Raises S0876."""
    graphs = _graphs(program, options, span)
    notes = [note for g in graphs for note in g.notes]
    if len(graphs) == 1:
        return notes
    if onnx_cut.has_cache(graphs[1].program):
        return [
            "two graphs: the encoder, which also makes the decoder's keys and values of its output, and the decoder with a cache "
            "(it reads the new target tokens)"
        ]
    return [
        f"two graphs: the encoder, and the decoder without a cache (it reads `{onnx_cut.STATES}` and all target tokens so far)", *notes,
    ]  # fmt: skip


# ------------------------------------------------------------------ one graph


def _make(graph: Graph, request: EmitRequest, options: Options) -> None:
    """Fills a graph's model, session and certificates."""
    program, span, precision = graph.program, request.span, options.precision
    modules = frozenset(a.module for a in onnx_live.held(program, request.live))
    live = onnx_live.tensor_names(program, modules)
    exact: list[Case] = []
    if precision != "fp32":
        root = live_root(program, request.tensors, dtype=torch.float32).eval()
        exact = cases(program, root, torch.float32)
        del root
    root = live_root(program, request.tensors, dtype=PRECISION[precision]).eval()
    if precision == "fp16":
        onnx_faults.refuse_lost(root, program, request, span)
    measured = cases(program, root, dtype_of(root), judge=precision != "fp16")  # its graph names the place better
    try:
        real_numbers(root)
        fused = (
            fuse(program, root, Target("onnx", options.target, precision, options.opset, frozenset(live)))
            if options.optimize and options.opset >= onnx_opset.EXPORTED
            else None
        )
        flat, table = (fused.graph, fused_translations()) if fused else (root, None)
        model = export(program, flat, opset=options.opset, live=live, table=table)
        if tied := onnx_live.tied(flat, model, live, measured[0].inputs):
            model = export(program, flat, opset=options.opset, live=live, closed=tied, table=table)
        model = onnx_opset.settle(model, options.opset, span)
        onnx_live.overridable(model, root, live, span)
        if live:
            metadata(model, onnx_live.RECORD, json.dumps(onnx_live.record(program, modules, model), sort_keys=True))
        report("emitting onnx: checking the graph", 3, STEPS)
        packed = onnx_files.Packed.of(model)
        run = checked_session(model, packed)
    except SurgeryError:
        raise
    except Exception as exc:
        raise onnx_faults.inexpressible(exc, span, options.opset, onnx_faults.Live(program, root, modules, live)) from exc
    report("emitting onnx: measuring torch against onnxruntime", 4, STEPS)
    try:
        graph.certificates += certify(program, measured, run, tolerance=TOLERANCE["fp32" if precision == "int8" else precision])
    except Exception as exc:
        raise onnx_faults.unrunnable(exc, span) from exc
    if live:
        graph.certificates += swaps(program, root, model, run, live, measured, TOLERANCE["fp32" if precision == "int8" else precision])
    if precision == "fp16":
        onnx_faults.refuse_overflow(graph.certificates, program, model, run, measured, span)
    onnx_faults.refuse_other(graph.certificates, span, onnx_faults.half_chooses(root, precision))
    if precision == "int8":
        model, run = _to_int8(graph, model, span, live)
        packed = None
    if exact:
        found = loss(program, exact, run, precision)
        graph.certificates += found
        onnx_faults.refuse_loss(found, precision, span)
    if graph.part:
        graph.certificates[:] = [{"graph": graph.part, **c} for c in graph.certificates]
    graph.certificates[:] = [{**c, **_measured(options)} for c in graph.certificates]
    if options.optimize and fused is None:
        graph.notes.append(f"not fused: operations of opset {onnx_opset.EXPORTED} and later would not survive the way to {options.opset}")
    if fused is not None:
        metadata(model, FUSIONS, json.dumps(fused.record(), sort_keys=True))
        graph.notes += fused.summary()
        graph.fusions += fused.record()
    graph.model, graph.run, graph.packed = model, run, packed


def _measured(options: Options) -> dict[str, str]:
    """What a certificate says of a graph for another processor than the one that measures it."""
    return {} if options.target == "cpu" else {"for": options.target, "measured_on": "cpu"}


def _to_int8(graph: Graph, model: Any, span: Span | None, live: Iterable[str]) -> tuple[Any, Any]:
    """The quantised model and its session. Raises S0875 when nothing in it can be quantised."""
    report("emitting onnx: rounding weights to int8", 4, STEPS)
    done = onnx_int8.quantize(model, live)
    if not done.weights:
        raise fail(
            "S0875", "no product of this graph has a constant matrix that int8 could hold", span, "asked for here",
            notes=[f"`{name}`: {why}" for name, why in done.kept[:4]], help="write `precision = fp32` or `fp16`",
        )  # fmt: skip
    kinds: dict[str, int] = {}
    for _, why in done.kept:
        kinds[why] = kinds.get(why, 0) + 1
    stay = "; ".join(f"{n} products stay in fp32: {why}" for why, n in kinds.items())
    graph.notes.append(f"int8: {len(done.weights)} weights by column" + (f"; {stay}" if stay else ""))
    return done.model, checked_session(done.model)


def _together(original: Program, whole: Program, graphs: list[Graph], request: EmitRequest, options: Options) -> list[dict[str, Any]]:
    """Claims on what the graphs are together: that a graph without cache is the model with an empty one, that two parts are the whole."""
    precision = "fp32" if options.precision == "int8" else options.precision
    found: list[dict[str, Any]] = []
    if whole is not original:
        (graph,) = graphs
        root = live_root(original, request.tensors, dtype=PRECISION[options.precision]).eval()
        found += _empty_cache(original, whole, root, graph, TOLERANCE[precision], options)
    if len(graphs) == 2:
        root = live_root(whole, request.tensors, dtype=PRECISION[options.precision]).eval()
        measured = cases(whole, root, dtype_of(root))
        share = LOSS["int8"][0] if options.precision == "int8" else TOLERANCE[precision]
        if onnx_cut.has_cache(graphs[1].program):
            found += onnx_steps.certify(whole, graphs[1].program, measured, graphs[0].run, graphs[1].run, share)
        else:
            found += chained(whole, measured, graphs[0].run, graphs[1].run, share, onnx_cut.STATES, onnx_cut.MASK)
    onnx_faults.refuse_other(found, request.span)
    return [{**c, **_measured(options)} for c in found]


def _empty_cache(original: Program, whole: Program, root: Any, graph: Graph, tolerance: float, options: Options) -> list[dict[str, Any]]:
    from surgery.backends.onnx_certify import difference
    from surgery.model.sample import sample_inputs

    share = LOSS["int8"][0] if options.precision == "int8" else tolerance
    with torch.no_grad():
        want = root(*sample_inputs(original, batch=2, length=9, seed=7, padding=True, dtype=dtype_of(root), past=0))
    given = sample_inputs(whole, batch=2, length=9, seed=7, padding=True, dtype=dtype_of(root))
    got = graph.run.run(None, feeds_of(whole, graph.run, Case("padded", 2, 9, given, [])))
    worst, scale, _ = difference(want[0], got[0])
    allowed = share * max(1.0, scale)
    return [{"claim": "without cache = with an empty one", "max_abs_error": worst, "tolerance": allowed, "ok": worst <= allowed}]


# ------------------------------------------------------------------ what is said of the files


def _told(graph: Graph, path: Path, options: Options) -> list[str]:
    """Notes for who runs the file."""
    held = {i.name for i in graph.model.graph.initializer}
    names = [i.name for i in graph.model.graph.input if i.name not in held]
    pair = graph.part == "decoder" and any(n.startswith("past_key_values.") for n in names)
    past = [n for n in names if n.startswith("past_key_values.")]
    own = ", ".join(f'"{n}": ...' for n in names if n not in past)
    lines = [f'{path.name}: onnxruntime.InferenceSession("{path.name}").run(None, {{{own}{", **past" if past else ""}}})']
    if pair:
        lines.append(
            f"{path.name}: past_key_values.LAYER.decoder.key and .value have no steps at first, then what present.LAYER.decoder.key and .value "
            "gave; past_key_values.LAYER.encoder.key and .value are the encoder's present.LAYER.encoder.key and .value, the same in every step"
        )
    elif past:
        lines.append(
            f"{path.name}: past_key_values.LAYER.key and .value have no steps at first, then what present.LAYER.key and .value gave"
        )
    live = [i.name for i in graph.model.graph.input if i.name in held]
    if live:
        lines.append(
            f'{path.name}: {len(live)} adapter tensors are inputs that may be given, as in {{**inputs, **surgery.adapter_inputs("{path.name}", "ARTIFACT")}}'
        )
    if graph.part == "decoder" and not pair:
        lines.append(f"{path.name}: `{onnx_cut.STATES}` is what the encoder gave; there is no cache, all target tokens so far go in")
    if options.target == "cuda":
        lines.append(f"{path.name}: for CUDA; its numbers were measured on the CPU here")
        if options.precision == "int8":
            lines.append(
                f"{path.name}: onnxruntime runs products of integers that are quantised at run time on the CPU, CUDA has no kernels for them"
            )
    return lines + [f"{path.name}: {note}" for note in graph.notes]
