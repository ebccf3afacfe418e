"""From a realised root graph to a clean ONNX model: dynamic axes, names of inputs, outputs and initializers, same bytes every time."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import fx

from surgery.backends import onnx_live
from surgery.backends.fuse.inline import NotInlined, inlined
from surgery.backends.onnx_direct import Assembled, assembled
from surgery.backends.onnx_ops import prepare, translations
from surgery.backends.onnx_opset import EXPORTED
from surgery.core.progress import report
from surgery.model.program import Program
from surgery.model.sample import placeholders, sample_inputs

STEPS = 6
"""Of one emission: tracing, translating, simplifying, checking, measuring, writing."""

_CACHE = re.compile(r"(?P<cache>\w+?)_(?P<what>key|value)_(?P<layer>\d+)")
_PAIR = re.compile(r"(?:past_key_values_)?(?P<side>decoder|encoder)_(?P<what>key|value)_(?P<layer>\d+)")
"""Flat inputs of a decoder beside an encoder: its own earlier keys and values, and those of the encoder's output."""


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints progress and logs through several channels; none of it belongs in our output."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what goes wrong is raised, too
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ------------------------------------------------------------------ names


def input_names(program: Program) -> list[str]:
    """The ONNX names of the flat inputs: those of ``forward``; a cache's tensors are ``past_key_values.LAYER.key`` and ``.value``, those of a
    decoder beside an encoder ``past_key_values.LAYER.decoder.key``, ``past_key_values.LAYER.encoder.key`` and so on."""
    return [_input_name(n) for n, _ in placeholders(program)]


def _input_name(name: str) -> str:
    if _PAIR.fullmatch(name):
        return _PAIR.sub(r"past_key_values.\g<layer>.\g<side>.\g<what>", name)
    return _CACHE.sub(r"\g<cache>.\g<layer>.\g<what>", name) if _CACHE.fullmatch(name) else name


def output_names(program: Program, count: int) -> list[str]:
    """Names of the flat outputs from the output tree: the path of keys, joined by dots; a cache's are ``present.LAYER.key``."""
    names: list[str] = []

    def walk(spec: Any, path: str) -> None:
        kind = spec.get("type")
        if kind == "tensor":
            names.append(path or "output")
        elif kind == "cache":
            layers = int(spec.get("layers", 0)) or sum(1 for i in spec.get("items", []) if i.get("type") == "tensor") // 2
            names.extend(f"present.{i}.{what}" for what in ("key", "value") for i in range(layers))
        elif kind != "const":
            keys = spec.get("keys") or [str(i) for i in range(len(spec.get("items", [])))]
            for key, item in zip(keys, spec.get("items", []), strict=True):
                walk(item, f"{path}.{key}" if path else str(key))

    walk(program.signature.out_spec, "")
    if len(names) != count or len(set(names)) != count:
        return [f"output_{i}" for i in range(count)]
    taken = set(input_names(program))
    return [f"{n}.output" if n in taken else n for n in names]


def axis_names(program: Program) -> dict[str, str]:
    """A readable name for every size symbol of the capture: ``batch``, ``sequence``, ``past``, ``decoder_sequence`` ..."""
    names: dict[str, str] = {}
    specs = dict(placeholders(program))
    for symbol, (name, axis, _) in program.signature.symbols.items():
        if "past" in name:
            wish = "batch" if axis == 0 else "past"
        elif axis == 0:
            wish = "batch"
        elif name.startswith("encoder_"):
            wish = "encoder_sequence"
        elif name in specs and len(specs[name].shape) == 2:
            wish = "decoder_sequence" if name.startswith("decoder") else "samples" if "float" in specs[name].dtype else "sequence"
        else:
            wish = f"{name}_{axis}"
        taken, number = set(names.values()), 1
        found = wish
        while found in taken:
            number += 1
            found = f"{wish}_{number}"
        names[symbol] = found
    return names


# ------------------------------------------------------------------ export


def traced(program: Program, root: fx.GraphModule, live: Sequence[str] = (), closed: Container[str] = ()) -> Any:
    """The ``ExportedProgram`` of a realised root, with ``live`` tensors as further inputs, those in ``closed`` of their own sizes alone; a flat graph that knows its values is not traced again.
    Raises what ``torch.export`` raises."""
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    example = sample_inputs(program, batch=3, length=13, seed=1, padding=False, dtype=dtype, past=5)
    axes: Any = tuple(
        {i: torch.export.Dim.DYNAMIC for i, n in enumerate(s.shape) if not _fixed(n)} or None for _, s in placeholders(program)
    )
    root.eval()
    if not live:

        def trace() -> Any:
            return torch.export.export(root, tuple(example), dynamic_shapes=axes, strict=False)

        try:
            flat = root if all(n.op != "call_module" for n in root.graph.nodes) else inlined(program, root)
        except NotInlined:
            return trace()
        return assembled(flat, example, trace) or trace()
    held = onnx_live.values(root, live)
    onnx_live.loosen(root, live)
    called = onnx_live.WithLive(root, list(held)).eval()
    free = torch.export.Dim.AUTO
    axes = ((*axes, *(None if n in closed else {i: free for i in range(t.ndim)} for n, t in held.items())),)
    return torch.export.export(called, (*example, *held.values()), dynamic_shapes=axes, strict=False)


def export(
    program: Program, root: fx.GraphModule, *, opset: int, live: Sequence[str] = (), closed: Container[str] = (),
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> Any:  # fmt: skip
    """The ONNX ``ModelProto`` of a realised root graph: flat inputs, flat outputs, the module's own tensor names.

    ``live`` tensors are further inputs under their names, with the axes open that the model leaves open, none of those in ``closed``; ``table``
    translates operations that the exporter does not know. Raises what torch's exporter raises when an operation has no translation.
    """
    outputs = next(n for n in root.graph.nodes if n.op == "output").args[0]
    names = output_names(program, len(outputs) if isinstance(outputs, (tuple, list)) else 1)
    prepare(root)
    report("emitting onnx: tracing", 0, STEPS)

    def translated(exported: Any) -> Any:
        return torch.onnx.export(
            exported, (), dynamo=True, opset_version=max(opset, EXPORTED), input_names=[*input_names(program), *live], output_names=names,
            external_data=False, optimize=False, verbose=False, custom_translation_table={**translations(), **(table or {})},
        )  # fmt: skip

    with quiet(), torch.no_grad():
        exported = traced(program, root, live, closed)
        report("emitting onnx: translating", 1, STEPS)
        try:
            made = translated(exported)
        except Exception:
            if not isinstance(exported, Assembled):
                raise
            made = translated(exported.again())  # an operation that the exporter has to take apart first
        report("emitting onnx: simplifying", 2, STEPS)
        _simplify(made.model, _tensor_names(root))
        return finish(made.model_proto, program, root)


def _fixed(size: Any) -> bool:
    return not getattr(size, "free_symbols", None)


def _tensor_names(root: torch.nn.Module) -> set[str]:
    return set(dict(root.named_parameters(remove_duplicate=False))) | set(dict(root.named_buffers(remove_duplicate=False)))


def _simplify(model: Any, keep: set[str]) -> None:
    """Constants folded, redundant operations removed, as the exporter does it, but no parameter is computed with.

    A weight that is transposed, cast or merged while exporting would lose its name and its layout; runtimes do that when they
    load a model. Equal parameters stay apart for the same reason, so duplicates are only merged among other constants.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter

    graph = model.graph
    common.InlinePass()(model)
    rules = [r for r in rewriter._DEFAULT_REWRITE_RULES if "BatchNorm" not in str(r.name)]  # they fold weights into weights
    for _ in range(2):
        folded = optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            should_fold=lambda n: False if any(v is not None and _own(v.name, keep) for v in n.inputs) else None,
        )
        rewriter.rewrite(model, rules)
        common.RemoveUnusedNodesPass()(model)
        if not folded.modified:
            break
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), common.LiftSubgraphInitializersToMainGraphPass(),
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(), common.OutputFixPass(), common.NameFixPass(),
    ):  # fmt: skip
        step(model)
    assert model.graph is graph


def _own(name: str | None, keep: set[str]) -> bool:
    return name is not None and name in keep


def finish(model: Any, program: Program, root: torch.nn.Module) -> Any:
    """A deterministic ModelProto: exporter traces and host paths removed, tensor names the module's own, axes with names."""
    keep = _tensor_names(root)
    del model.metadata_props[:]
    model.doc_string = ""
    model.producer_name, model.producer_version = "model-surgery", ""
    model.graph.name, model.graph.doc_string = "model", ""
    for graph in [model.graph, *model.functions]:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for group in (model.graph.initializer, model.graph.value_info, model.graph.input, model.graph.output):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""
    del model.graph.metadata_props[:]
    # the exporter may spell a parameter `p_encoder_layer_0_weight`: give every initializer its own name back
    flat = {n.replace(".", "_"): n for n in keep}
    rename = {}
    for init in model.graph.initializer:
        plain = init.name.removeprefix("p_").removeprefix("b_").removeprefix("c_")
        own = flat[plain] if init.name not in keep and plain in flat else init.name
        rename[init.name] = program.aliases.get(own, own)  # a tensor with several names has its first
    there: set[str] = set()
    for init in list(model.graph.initializer):
        init.name = rename[init.name]
        if init.name in there:
            model.graph.initializer.remove(init)
        there.add(init.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
    _name_axes(model, program)
    return model


def _quotient(a: str, b: str, by: str) -> str:
    """``a*b // by`` where that is one of the two, else ""."""
    return a if by == b else b if by == a else ""


def _name_axes(model: Any, program: Program) -> None:
    """The exporter's symbols (``s41``, ``s41 + s27``) become our names everywhere in the graph."""
    wanted = axis_names(program)

    def named(text: str, names: dict[str, str]) -> str:
        text = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), text)
        text = re.sub(r"\(\((\w+)\*(\w+)\)//(\w+)\)", lambda m: _quotient(*m.groups()) or m.group(), text)
        return " + ".join(sorted(text.split(" + "))) if re.fullmatch(r"\w+( \+ \w+)+", text) else text

    table: dict[str, str] = {}
    inputs = placeholders(program)
    for value, (_, spec) in zip(model.graph.input, inputs, strict=False):  # live tensors stand behind the model's own inputs
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if dim.dim_param and not _fixed(size):
                table.setdefault(dim.dim_param, named(str(size), wanted))
    for group in (model.graph.input, model.graph.output, model.graph.value_info):
        for value in group:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param.isdigit():  # an axis that was open and turned out to be fixed
                    dim.dim_value = int(dim.dim_param)
    for value in model.graph.input[len(inputs) :]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param not in table:
                number = sum(n == "rank" or n.startswith("rank_") for n in table.values())
                table[dim.dim_param] = f"rank_{number + 1}" if number else "rank"
    for group in (model.graph.input, model.graph.output, model.graph.value_info):
        for value in group:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = table.get(dim.dim_param) or named(dim.dim_param, table)
