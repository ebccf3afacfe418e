"""The floor: a model's matrix products and nothing else, chained so that each waits for the one before, in onnxruntime and in torch.

Whatever a runtime fuses, it computes these products. Biases, norms, activations, softmax, look-ups and copies are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference_models import Case, Shape


@dataclass(frozen=True)
class Sizes:
    """Widths of one layer, and of what stands before and behind all layers: (inputs, outputs) of each product by token."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    chain: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, int], ...]
    tokens: int


def sizes_of(case: Case, config: Any, shape: Shape) -> Sizes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv, width = getattr(config, "num_key_value_heads", None) or heads, hidden // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    gated = getattr(config, "model_type", "") == "llama"
    # query, then key and value from the same input, then output; up (and gate), down
    chain = [
        (hidden, hidden),
        (hidden, kv * width),
        (hidden, kv * width),
        (hidden, hidden),
        *[(hidden, inner)] * (2 if gated else 1),
        (inner, hidden),
    ]
    ends: list[tuple[int, int]] = []
    tokens = shape.length
    if case.images:
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        ends.append((config.num_channels * config.patch_size**2, hidden))
    if case.cached:
        ends.append((hidden, config.vocab_size))
    return Sizes(config.num_hidden_layers, heads, kv, width, tuple(chain), tuple(ends), tokens)


def torch_floor(s: Sizes, shape: Shape) -> Callable[[], Any]:
    """The products in torch: those that share an input as one, the rest in order, attention as batched products."""
    generator = torch.Generator().manual_seed(0)
    hidden, groups, inner_ = s.chain[0][0], _grouped(s), None

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(columns, rows, generator=generator) / math.sqrt(rows)

    weights = [[weight(a, b) for a, b in groups] for _ in range(s.layers)]
    ends = [(torch.randn(shape.batch * s.tokens, a, generator=generator), weight(a, b)) for a, b in s.ends]
    x0 = torch.randn(shape.batch * s.tokens, hidden, generator=generator)
    steps = shape.past + s.tokens
    q = torch.randn(shape.batch * s.heads, s.tokens, s.width, generator=generator)
    k = torch.randn(shape.batch * s.heads, s.width, steps, generator=generator) / math.sqrt(s.width)
    v = torch.randn(shape.batch * s.heads, steps, s.width, generator=generator) / steps
    del inner_

    def run() -> Any:
        with torch.inference_mode():
            x, context, last = x0, q, []
            for layer in weights:
                for w in layer:
                    x = torch.mm(x[:, : w.shape[1]], w.t())
                x = x[:, :hidden]
                context = torch.bmm(torch.bmm(context, k), v)
            for given, w in ends:
                last.append(torch.mm(given, w.t()))
            return x, context, last

    return run


def _grouped(s: Sizes) -> list[tuple[int, int]]:
    """The products of a layer, those that read the same input as one: query, key and value; gate and up."""
    (hidden, q), (_, k), (_, v), output, *rest = s.chain
    ffn = [(hidden, sum(b for _, b in rest[:-1])), rest[-1]]
    return [(hidden, q + k + v), output, *ffn]


def onnx_floor(s: Sizes, shape: Shape, path: Path, threads: int) -> Callable[[], Any]:
    """The products in onnxruntime: a chain of MatMul, one a weight, and a chain of batched ones for attention."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, inits = [], []

    def product(a: str, rows: int, columns: int, out: str) -> None:
        name = f"w.{len(inits)}"
        inits.append(
            numpy_helper.from_array(
                (generator.standard_normal((rows, columns), dtype=np.float32) / math.sqrt(rows)).astype(np.float32), name
            )
        )
        nodes.append(helper.make_node("MatMul", [a, name], [out]))

    hidden = s.chain[0][0]
    at, context = "x", "q"
    for i in range(s.layers):
        width = hidden
        for j, (rows, columns) in enumerate(s.chain):
            if rows == width:
                product(at, rows, columns, f"x.{i}.{j}")
                at, width = f"x.{i}.{j}", columns
            else:  # reads the layer's input (or what is of the right width), so it stands beside the chain and is an output of its own
                product("x" if rows == hidden else at, rows, columns, f"side.{i}.{j}")
                if rows != hidden or columns == hidden:
                    at, width = f"side.{i}.{j}", columns
        nodes.append(helper.make_node("MatMul", [context, "k"], [f"s.{i}"]))
        nodes.append(helper.make_node("MatMul", [f"s.{i}", "v"], [f"c.{i}"]))
        context = f"c.{i}"
    values: dict[str, Any] = {}
    steps = shape.past + s.tokens
    values["x"] = generator.standard_normal((shape.batch, s.tokens, hidden), dtype=np.float32)
    values["q"] = generator.standard_normal((shape.batch, s.heads, s.tokens, s.width), dtype=np.float32)
    values["k"] = (generator.standard_normal((shape.batch, s.heads, s.width, steps), dtype=np.float32) / math.sqrt(s.width)).astype(
        np.float32
    )
    values["v"] = (generator.standard_normal((shape.batch, s.heads, steps, s.width), dtype=np.float32) / steps).astype(np.float32)
    outputs = [at, context]
    for j, (rows, columns) in enumerate(s.ends):
        values[f"e.{j}"] = generator.standard_normal((shape.batch, s.tokens, rows), dtype=np.float32)
        product(f"e.{j}", rows, columns, f"end.{j}")
        outputs.append(f"end.{j}")
    used = {i for n in nodes for i in n.input}
    outputs += [o for n in nodes for o in n.output if o not in used and o not in outputs]
    graph = helper.make_graph(
        nodes, "floor", [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in values.items()],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs], inits,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    from benchmarks.inference_arms import session

    run = session(path, threads)
    return lambda: run.run(None, values)
