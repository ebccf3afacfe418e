"""Versions of the ONNX operator set: which ones this installation can check and run, and which one a graph needs."""

from __future__ import annotations

from functools import cache
from typing import Any

from surgery.core.diagnostics import fail
from surgery.core.source import Span

EXPORTED = 18
"""The oldest version that torch's exporter writes itself; a graph for an older one is converted down from it."""


@cache
def newest_checked() -> int:
    """The newest operator set that the installed onnx knows."""
    import onnx

    return int(onnx.defs.onnx_opset_version())


@cache
def newest_run() -> int:
    """The newest operator set that the installed onnxruntime loads: found by loading a graph of one node."""
    from surgery.backends.onnx_run import session

    for opset in range(newest_checked(), 6, -1):
        try:
            session(_identity(opset).SerializeToString())
        except Exception:  # the runtime has a class of its own for each way to refuse
            continue
        return opset
    return 0


def _identity(opset: int) -> Any:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@cache
def newest_exported() -> int:
    """The newest operator set that the exporter's converter writes."""
    from onnxscript.version_converter import _version_converter as converter

    return int(getattr(converter, "SUPPORTED_MAX_ONNX_OPSET", EXPORTED))


@cache
def known() -> dict[str, int]:
    """The packages that make, check and run graphs, with the newest operator set of each."""
    import onnx
    import onnxruntime
    import onnxscript

    return {
        f"onnx {onnx.__version__}": newest_checked(), f"onnxruntime {onnxruntime.__version__}": newest_run(),
        f"onnxscript {onnxscript.__version__}": newest_exported(),
    }  # fmt: skip


def check_new(opset: int, span: Span | None) -> None:
    """S0873 when no graph of this version can be made, checked and run here."""
    last = min(known().values())
    if opset <= last:
        return
    who = [f"{name} knows operator sets up to {n}" for name, n in known().items() if n < opset]
    raise fail(
        "S0873", f"opset {opset} is newer than what is installed here can make and run", span, "asked for here", notes=who,
        help=[f"write `opset = {last}`", "an operator set that is not released yet cannot be measured"],
    )  # fmt: skip


def version_of(model: Any) -> int:
    """The version of the standard's own operator set that a model states."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


@cache
def _history() -> dict[str, tuple[int, ...]]:
    import onnx

    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, set()).add(int(schema.since_version))
    return {name: tuple(sorted(versions)) for name, versions in found.items()}


def needs(model: Any) -> dict[str, int]:
    """For each operation of the standard in a model the version that it came with."""
    history = _history()
    return {n.op_type: history[n.op_type][0] for n in _nodes(model.graph) if n.domain in ("", "ai.onnx") and n.op_type in history}


def _nodes(graph: Any) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for inner in attribute.graphs:
                yield from _nodes(inner)


def settle(model: Any, opset: int, span: Span | None) -> Any:
    """The model in the operator set that was asked for. Raises S0872 when it has an operation that the version does not have, or one that
    no converter can write in it."""
    young = sorted((since, name) for name, since in needs(model).items() if since > opset)
    if young:
        raise _too_old(opset, max(since for since, _ in young), [f"`{name}` came with opset {since}" for since, name in young], span)
    if version_of(model) == opset:
        return model
    import onnx.version_converter as converter

    large = {}
    for init in model.graph.initializer:
        if len(init.raw_data) > 4096:  # the converter copies whole models and looks at small constants only
            large[init.name] = init.raw_data
            init.raw_data = b""
    try:
        converted = converter.convert_version(model, opset)
    except Exception as exc:  # the converter has no class of its own
        why = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise _too_old(opset, EXPORTED, [f"the converter says: {why}"], span) from exc
    for init in converted.graph.initializer:
        if init.name in large:
            init.raw_data = large[init.name]
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    return converted


def _too_old(opset: int, enough: int, notes: list[str], span: Span | None) -> Exception:
    return fail(
        "S0872", f"opset {opset} is too old for this graph", span, "asked for here", notes=notes[:6], help=f"write `opset = {enough}`"
    )
