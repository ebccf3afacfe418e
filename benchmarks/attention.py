"""Which operation of onnxruntime attends fastest with shared heads and a cache, and which of them keeps padding right.

    python -m benchmarks.attention [--rounds 30]

One attention of 12 heads on 4 of keys, 64 wide, on one thread, in seconds of the processor. "Rows" is com.microsoft MultiHeadAttention with the queries of a
group as further queries of their one head; the others are com.microsoft GroupQueryAttention, with and without scores that are added, and Attention of
the ONNX standard. A difference to the formula says that the operation cannot express the padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import table

HEADS, GROUPS, WIDTH = 12, 4, 64
SHAPES = (
    (1, 1, 128, False),
    (1, 1, 1024, False),
    (4, 1, 512, True),
    (1, 128, 0, False),
    (1, 512, 0, False),
    (4, 128, 0, True),
    (2, 3, 4, True),
)
"""Batch, new steps, steps in the cache, and whether rows behind the first are padded in front."""


def forms() -> dict[str, Any]:
    """Sessions on the inputs q, k, v [batch, steps, heads * width], pk, pv [batch, groups, past, width], scores and lengths."""
    import onnxruntime
    from onnx import TensorProto, helper

    each, make = HEADS // GROUPS, helper.make_node
    own: dict[str, Any] = {"domain": "com.microsoft"}
    shapes = {
        "q": ["b", "s", HEADS * WIDTH], "k": ["b", "s", GROUPS * WIDTH], "v": ["b", "s", GROUPS * WIDTH], "pk": ["b", GROUPS, "p", WIDTH],
        "pv": ["b", GROUPS, "p", WIDTH], "scores": ["b", 1, "s", "t"], "rows": ["b", 1, "r", "t"], "lengths": ["b"], "total": [1],
    }  # fmt: skip
    sizes = {
        "to_kv": [0, 0, GROUPS, WIDTH], "apart": [0, 0, GROUPS, each, WIDTH], "lines": [0, 0, -1, GROUPS * WIDTH], "flat": [0, -1, GROUPS * WIDTH],
        "wide": [0, each, -1, GROUPS * WIDTH], "wider": [0, each, -1, GROUPS, WIDTH], "out": [0, 0, HEADS * WIDTH],
    }  # fmt: skip

    def session(nodes: list[Any], opset: int = 20) -> Any:
        read = {i for n in nodes for i in n.input}
        inits = [helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in sizes.items() if n in read]
        kinds = {n: TensorProto.INT32 if n in ("lengths", "total") else TensorProto.FLOAT for n in shapes}
        inputs = [helper.make_tensor_value_info(n, kinds[n], s) for n, s in shapes.items() if n in read]
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "nk", "nv")]
        graph = helper.make_graph(nodes, "attention", inputs, outputs, inits)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        data = helper.make_model(graph, opset_imports=imports, ir_version=10 if opset < 23 else 11).SerializeToString()
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    outs = ["y", "nk", "nv"]
    rows = []
    for t in "kv":
        rows += [make("Reshape", [t, "to_kv"], [f"{t}1"]), make("Transpose", [f"{t}1"], [f"{t}2"], perm=[0, 2, 1, 3])]
        rows.append(make("Concat", [f"p{t}", f"{t}2"], [f"n{t}"], axis=2))
    rows += [
        make("Reshape", ["q", "apart"], ["q1"]), make("Transpose", ["q1"], ["q2"], perm=[0, 3, 1, 2, 4]), make("Reshape", ["q2", "lines"], ["q3"]),
        make("Reshape", ["q3", "flat"], ["q4"]), make("MultiHeadAttention", ["q4", "nk", "nv", "", "", "rows"], ["o"], num_heads=GROUPS, **own),
        make("Reshape", ["o", "wide"], ["o1"]), make("Reshape", ["o1", "wider"], ["o2"]), make("Transpose", ["o2"], ["o3"], perm=[0, 2, 3, 1, 4]),
        make("Reshape", ["o3", "out"], ["y"]),
    ]  # fmt: skip
    grouped = ["q", "k", "v", "pk", "pv", "lengths", "total"]
    counts: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": GROUPS, **own}
    standard = make("Attention", ["q", "k", "v", "scores", "pk", "pv"], outs, q_num_heads=HEADS, kv_num_heads=GROUPS)
    return {
        "rows": session(rows),
        "GroupQueryAttention": session([make("GroupQueryAttention", grouped, outs, **counts)]),
        "with scores": session([make("GroupQueryAttention", [*grouped, "", "", "", "scores"], outs, **counts)]),
        "Attention": session([standard], 23),
    }


def inputs(batch: int, steps: int, past: int, left: bool) -> tuple[dict[str, Any], Any, Any]:
    """Random inputs, what the formula gives for them, and which queries count."""
    draw, each = np.random.default_rng(0), HEADS // GROUPS
    shapes = {n: (batch, steps, g * WIDTH) for n, g in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))}
    shapes |= {n: (batch, GROUPS, past, WIDTH) for n in ("pk", "pv")}
    given: dict[str, Any] = {n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    scores = np.repeat(np.triu(np.full((steps, past + steps), -1e9, np.float32), past + 1)[None, None], batch, 0)
    if left:
        scores[1:, :, :, : max(1, (past + steps) // 4)] = -1e9
    given |= {"scores": scores, "rows": np.tile(scores, (1, 1, each, 1)), "total": np.array([past + steps], np.int32)}
    given["lengths"] = np.full(batch, past + steps - 1, np.int32)
    key, value = (
        np.concatenate([given[f"p{t}"], given[t].reshape(batch, steps, GROUPS, WIDTH).transpose(0, 2, 1, 3)], 2).repeat(each, 1)
        for t in "kv"
    )
    query = given["q"].reshape(batch, steps, HEADS, WIDTH).transpose(0, 2, 1, 3)
    weights = np.einsum("bhsd,bhtd->bhst", query, key) * WIDTH**-0.5 + scores
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("bhst,bhtd->bhsd", weights, value).transpose(0, 2, 1, 3).reshape(batch, steps, -1)
    return given, wanted, (scores > -1).any(-1)[:, 0]


def measured(run: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        run()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    sessions = forms()
    rows: list[tuple[str, ...]] = [("batch, new, past, padded in front", *(f"{n}, us (difference)" for n in sessions))]
    for shape in SHAPES:
        given, wanted, counts = inputs(*shape)
        cells = []
        for run in sessions.values():
            own = {i.name: given[i.name] for i in run.get_inputs()}
            try:
                gap = float(np.abs(run.run(None, own)[0] - wanted)[counts].max())
            except Exception as exc:  # the runtime has a class of its own for each way to refuse
                cells.append(f"refused: {str(exc).split(' : ')[-1][:60]}")
                continue
            seconds = measured(lambda run=run, own=own: run.run(None, own), args.rounds)  # type: ignore[misc]
            cells.append(f"{1e6 * seconds:.0f} ({gap:.0e})")
        rows.append((str(shape).strip("()"), *cells))
    print(table(rows))


if __name__ == "__main__":
    main()
