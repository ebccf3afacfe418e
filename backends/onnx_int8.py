"""Dynamic quantisation to 8 bits: matrix products with constant weights become products of integers.

The runtime's own quantiser does it: weights are rounded to int8 with one scale for each column, activations to uint8 with one scale and
zero point for each product, measured while it runs. A weight ``W`` becomes ``W_quantized``, ``W_scale`` and ``W_zero_point``, stored
as the product reads it, ``[in, out]``. Embeddings, norms, biases, convolutions, products of two activations and live adapters stay in
fp32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.backends import onnx_files

LAYOUT = ("Transpose", "Slice", "Squeeze", "Unsqueeze", "Reshape")
"""Operations that only say how a constant is read: they are carried out, so that products read a constant itself."""


@dataclass(frozen=True)
class Quantized:
    """The model, the weights that are integers now, and the products that stayed with the reason."""

    model: Any
    weights: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]


def quantize(model: Any, skip: Iterable[str] = ()) -> Quantized:
    """A quantised copy of a float32 model. Weights named in ``skip`` and graph inputs stay as they are."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = onnx.ModelProto()
    source.CopyFrom(model)
    carry_out(source)
    held = {i.name: i for i in source.graph.initializer}
    given, skipped = {i.name for i in source.graph.input}, set(skip)
    products, kept = [], []
    for i, node in enumerate(source.graph.node):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        node.name = node.name or f"product_{i}"
        weight = node.input[1]
        if node.op_type == "MatMul" and weight in held and weight not in given | skipped and len(held[weight].dims) == 2:
            products.append(node.name)
        else:
            kept.append((node.output[0], _reason(node, weight, held, given | skipped)))
    names = {n.name: n.input[1] for n in source.graph.node if n.name in set(products)}
    if not products:
        return Quantized(model, (), tuple(kept))
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
            large = onnx_files.weight_bytes(source) > onnx_files.INLINE_LIMIT
            path = onnx_files.inside(Path(folder), source) if large else path
            if not large:
                path.write_bytes(source.SerializeToString())
            quantize_dynamic(
                path, out, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], nodes_to_quantize=products,
                use_external_data_format=large,
            )  # fmt: skip
            made = onnx.load(str(out))
    finally:
        logging.disable(level)
    _clean(made, source)
    rounded = {i.name for i in made.graph.initializer}
    weights = tuple(dict.fromkeys(w for w in names.values() if f"{w}_quantized" in rounded))
    kept += [(n.output[0], "the quantiser left it") for n in source.graph.node if n.name in names and names[n.name] not in weights]
    return Quantized(made, weights, tuple(kept))


def _reason(node: Any, weight: str, held: dict[str, Any], given: set[str]) -> str:
    if weight in given:
        return "its weight is an adapter that stays live"
    if weight not in held:
        return "both sides are computed"
    return "its weight is no matrix" if len(held[weight].dims) != 2 else "it scales its result"


def _clean(made: Any, source: Any) -> None:
    """What the quantiser leaves of itself in a model goes; the order of initializers is by name."""
    made.producer_name, made.producer_version = source.producer_name, source.producer_version
    del made.metadata_props[:]
    made.metadata_props.extend(source.metadata_props)
    made.ir_version = source.ir_version
    made.graph.name = source.graph.name
    for init in made.graph.initializer:
        if init.data_location == 1:
            init.data_location = 0
        init.ClearField("external_data")
    _raw(made)
    ordered = sorted(made.graph.initializer, key=lambda i: i.name)
    copies = [type(i)() for i in ordered]
    for copy, init in zip(copies, ordered, strict=True):
        copy.CopyFrom(init)
    del made.graph.initializer[:]
    made.graph.initializer.extend(copies)
    del made.graph.value_info[:]


def _raw(model: Any) -> None:
    """Every initializer as raw bytes: the quantiser writes scales as lists of numbers."""
    import onnx

    for init in model.graph.initializer:
        if not init.HasField("raw_data") and any(init.dims) and init.data_type != 8:
            fresh = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(init), init.name)
            init.CopyFrom(fresh)


# ------------------------------------------------------------------ constants as they are read


def carry_out(model: Any) -> None:
    """Carries out transposes, slices and the like of constants, in place.

    The result keeps the weight's name when nothing else reads the weight, else it is ``NAME.as_read``; what a slice cuts out, such as one
    expert, is ``NAME.part``, ``NAME.part_2`` ... in order.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    given = {i.name for i in graph.input}
    held = {i.name: i for i in graph.initializer if i.name not in given}
    taken = set(held) | given | {n for node in graph.node for n in node.output}
    _open_gemms(graph, held)
    out = {o.name for o in graph.output}
    readers: dict[str, int] = {}
    for name in (*(n for node in graph.node for n in node.input), *out):
        readers[name] = readers.get(name, 0) + 1
    became: dict[str, str] = {}
    for node in list(graph.node):
        for i, read in enumerate(node.input):
            if read in became:
                node.input[i] = became[read]
        old = node.output[0] if node.output else ""
        if node.op_type not in LAYOUT or old in out or not all(n in held for n in node.input if n) or len(held[node.input[0]].dims) < 2:
            continue
        weight = node.input[0]
        arrays = {n: onnx.numpy_helper.to_array(held[n]) for n in node.input if n}
        (value,) = ReferenceEvaluator(_alone(node, held, model.opset_import)).run(None, arrays)
        cut = node.op_type == "Slice"
        last = readers[weight] == 1 and not cut
        name = weight if last else _free(f"{weight}.part" if cut else f"{weight}.as_read", taken)
        taken.add(name)
        made = onnx.numpy_helper.from_array(value.copy(order="C"), name)
        if last:
            held[weight].CopyFrom(made)
        else:
            readers[weight] -= 1
            graph.initializer.append(made)
            held[name] = graph.initializer[-1]
        readers[name] = readers.get(old, 0)
        became[old] = name
        graph.node.remove(node)
    for info in [v for v in graph.value_info if v.name in held or v.name in became]:
        graph.value_info.remove(info)  # a weight that is stored as it is read has another shape
    used = {n for node in graph.node for n in node.input} | {o.name for o in graph.output}
    for init in [i for i in graph.initializer if i.name not in used and i.name not in given]:
        graph.initializer.remove(init)


def _alone(node: Any, held: dict[str, Any], opsets: Any) -> Any:
    """A model of one node whose inputs are constants."""
    import onnx

    names = dict.fromkeys(n for n in node.input if n)
    inputs = [onnx.helper.make_tensor_value_info(n, held[n].data_type, held[n].dims) for n in names]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_empty_tensor_value_info(node.output[0])])
    return onnx.helper.make_model(graph, opset_imports=opsets)


def _open_gemms(graph: Any, held: dict[str, Any]) -> None:
    """A Gemm that is a product with a constant and a sum becomes these two, so that one rule serves both forms."""
    import onnx

    for i, node in reversed(list(enumerate(graph.node))):
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Gemm" or node.input[1] not in held or settings.get("transA") or settings.get("alpha", 1.0) != 1.0:
            continue
        if settings.get("beta", 1.0) != 1.0:
            continue
        left, weight, *rest = node.input
        out, name = node.output[0], node.name or f"gemm_{i}"
        nodes = []
        if settings.get("transB"):
            nodes.append(onnx.helper.make_node("Transpose", [weight], [f"{out}.turned"], perm=[1, 0]))
            weight = f"{out}.turned"
        summed = [n for n in rest if n]
        nodes.append(onnx.helper.make_node("MatMul", [left, weight], [f"{out}.product" if summed else out], name=name))
        if summed:
            nodes.append(onnx.helper.make_node("Add", [f"{out}.product", *summed], [out]))
        del graph.node[i]
        for made in reversed(nodes):
            graph.node.insert(i, made)


def _free(name: str, taken: set[str]) -> str:
    found, n = name, 1
    while found in taken:
        n += 1
        found = f"{name}_{n}"
    return found
