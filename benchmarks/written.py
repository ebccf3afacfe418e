"""What it gains to fuse attention that models write out: graphs with and without the rule, in seconds of the processor, by turns.

    python -m benchmarks.written [mpnet roformer bloom mpt gptj gpt_neo gpt] [--seconds 4] [--opset 20 23]

Models of three layers, 384 wide, with six heads and seeded weights, on one thread. The ratio is that of neighbouring runs, so what else the machine does falls on both.
Both graphs are compared with torch. Beside each other they may be equal to the last bit, where the runtime's attention does the same products and a factor that is
a power of two; that they are two graphs at all is checked by their operations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common import table

WIDE, HEADS, LAYERS = 384, 6, 3
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mpnet": ("MPNetModel", "MPNetConfig", dict(
        hidden_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDE, max_position_embeddings=1024)),
    "roformer": ("RoFormerModel", "RoFormerConfig", dict(
        hidden_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDE, max_position_embeddings=1024)),
    "gpt": ("OpenAIGPTModel", "OpenAIGPTConfig", dict(n_embd=WIDE, n_layer=LAYERS, n_head=HEADS, n_positions=1024)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=WIDE, n_layer=LAYERS, n_head=HEADS)),
    "mpt": ("MptForCausalLM", "MptConfig", dict(d_model=WIDE, n_layers=LAYERS, n_heads=HEADS, max_seq_len=1024)),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", dict(n_embd=WIDE, n_layer=LAYERS, n_head=HEADS, n_positions=1024, rotary_dim=32, bos_token_id=1, eos_token_id=2)),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", dict(
        hidden_size=WIDE, num_layers=2, num_heads=HEADS, max_position_embeddings=1024, window_size=128, intermediate_size=4 * WIDE,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)),
}  # fmt: skip
CACHED = ((1, 128, 0), (1, 1, 128), (4, 1, 400))
WHOLE = ((1, 16, 0), (1, 128, 0), (1, 512, 0))


def graphs(name: str, opset: int) -> tuple[Any, Any, dict[str, Any]]:
    """The program of a model, its root and its two sessions. Raises where the rule finds nothing to fuse."""
    import torch
    import transformers

    from surgery.backends.fuse import Target, fuse
    from surgery.backends.fuse.engine import rules
    from surgery.backends.fuse.ops import translations
    from surgery.backends.onnx_export import export
    from surgery.model.live import Tensors, live_root
    from surgery.opening import open_program
    from surgery.passes import registry

    cls, config, sizes = MODELS[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, config)(vocab_size=500, architectures=[cls], **sizes).save_pretrained(folder)
        program, _ = open_program(f"config:{folder}/config.json", use_cache=False)
    found, softmaxes = {}, []
    for label, left_out in (("single operations", {"written_attention"}), ("fused", set())):
        root = live_root(program, Tensors(registry.function), dtype=torch.float32).eval()
        fused = fuse(program, root, Target(opset=opset), [r.name for r in rules() if r.name not in left_out])
        model = export(program, fused.graph, opset=opset, table=translations())
        softmaxes.append(sum(n.op_type == "Softmax" for n in model.graph.node))
        found[label] = session(model)
    if softmaxes[0] <= softmaxes[1]:
        said = next(e for e in fused.report if e.rule == "written_attention").misses
        raise SystemExit(f"{name}: nothing was fused: " + "; ".join(sorted({f"{m.condition} ({m.detail})" for m in said})))
    return program, live_root(program, Tensors(registry.function), dtype=torch.float32).eval(), found


def session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measured(
    program: Any, root: Any, sessions: dict[str, Any], shape: tuple[int, int, int], seconds: float
) -> tuple[float, float, list[float]]:
    """Milliseconds of the first graph, the median of ratios, and the largest differences as shares of the output's scale: of both graphs from torch."""
    import torch

    from surgery.backends.onnx_export import input_names
    from surgery.model.sample import sample_inputs

    batch, length, past = shape
    values = sample_inputs(program, batch=batch, length=length, seed=9, padding=batch > 1, past=past)
    named = {n: t.numpy() for n, t in zip(input_names(program), values, strict=True)}
    feeds = {k: {i.name: named[i.name] for i in s.get_inputs()} for k, s in sessions.items()}
    with torch.no_grad():
        made = root(*values)
    want = (made[0] if isinstance(made, (tuple, list)) else made).numpy()
    gaps = [float(np.abs(s.run(None, feeds[k])[0] - want).max() / np.abs(want).max()) for k, s in sessions.items()]
    times: list[list[float]] = []
    end = time.process_time() + seconds
    while time.process_time() < end or len(times) < 5:
        turn = []
        for k, s in sessions.items():
            start = time.process_time()
            for _ in range(10 if length == 1 else 2):
                s.run(None, feeds[k])
            turn.append((time.process_time() - start) / (10 if length == 1 else 2))
        times.append(turn)
    ratio = statistics.median(b / a for a, b in times)
    return 1e3 * statistics.median(a for a, _ in times), ratio, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--opset", type=int, nargs="*", default=[20])
    args = parser.parse_args()
    rows: list[tuple[str, ...]] = [
        ("model", "opset", "batch, new, past", "single operations, ms", "fused", "from torch", "fused from torch")
    ]
    for name in args.models:
        for opset in args.opset:
            program, root, sessions = graphs(name, opset)
            cached = any(i.name.startswith("past") for i in sessions["fused"].get_inputs())
            for shape in CACHED if cached else WHOLE:
                ms, ratio, gaps = measured(program, root, sessions, shape, args.seconds)
                rows.append((name, str(opset), str(shape).strip("()"), f"{ms:.2f}", f"{ratio:.3f}", *(f"{gap:.0e}" for gap in gaps)))
    print(table(rows))


if __name__ == "__main__":
    main()
