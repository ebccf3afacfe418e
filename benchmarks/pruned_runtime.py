"""How much faster a pruned MiniLM is than the whole one, beside how much less it computes.

Half of the heads and half of the feed-forward units go (`prune heads` and `prune ffn`, by magnitude). The whole and the pruned model run as the emitted module
and as the emitted ONNX file in onnxruntime, taking turns; the median counts. The FLOP ratio is that of the plans at the length measured.

    python -m benchmarks.pruned_runtime [--rounds 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.common import interleaved, table

SHAPES = ((1, 16), (1, 128), (8, 128))
PRUNED = "prune heads(ratio = 50%) on layers[*].attn\nprune ffn(ratio = 50%) on layers[*].ffn\n"


def compiled(name: str, text: str) -> None:
    import surgery

    with contextlib.redirect_stderr(io.StringIO()):
        surgery.compile(f'surg 1\nmodel "minilm"\n{text}emit torch to "{name}"\nemit onnx to "{name}.onnx"\n', force=True)


def flops(text: str, length: int) -> int:
    """FLOPs of one token at a length, from the plan's own count."""
    from surgery.model import cost
    from surgery.opening import open_program

    program, _ = open_program("minilm")
    if text:
        from surgery.core.plan import Plan
        from surgery.driver import load_spec
        from surgery.session import Session

        session = Session(spec=load_spec(f"surg 1\n{text}"), program=program, plan=Plan(spec="", edition=1, model={}))
        session.run()
    return cost.flops_per_token(program, length=length)


def arms(batch: int, length: int, threads: int) -> dict[str, Callable[[], Any]]:
    import onnxruntime
    import torch

    import surgery

    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    out: dict[str, Callable[[], Any]] = {}
    for name in ("whole", "pruned"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": torch.zeros_like(ids).numpy()}
        feeds = {i.name: feeds[i.name] for i in session.get_inputs()}
        out[f"{name} onnx"] = lambda session=session, feeds=feeds: session.run(None, feeds)
        module = surgery.load(name).eval()

        def eager(module: Any = module) -> Any:
            with torch.inference_mode():
                return module(input_ids=ids, attention_mask=mask)

        out[f"{name} torch"] = eager
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        compiled("whole", "freeze all on layers[*].**\n")
        compiled("pruned", PRUNED)
        rows: list[tuple[str, ...]] = [("shape", "runtime", "whole, ms", "pruned, ms", "speed-up", "FLOP ratio", "share of the ratio")]
        for batch, length in SHAPES:
            ratio = flops("", length) / flops(PRUNED, length)
            times = interleaved(arms(batch, length, args.threads), args.rounds, 5)
            for runtime in ("onnx", "torch"):
                whole, pruned = times[f"whole {runtime}"], times[f"pruned {runtime}"]
                rows.append(
                    (f"({batch}, {length})", runtime, f"{whole:.2f}", f"{pruned:.2f}", f"{whole / pruned:.2f}", f"{ratio:.2f}", f"{whole / pruned / ratio:.0%}")
                )  # fmt: skip
            best = min(times[k] for k in times if k.startswith("whole")) / min(times[k] for k in times if k.startswith("pruned"))
            rows.append((f"({batch}, {length})", "best of each", "", "", f"{best:.2f}", f"{ratio:.2f}", f"{best / ratio:.0%}"))
    print(table(rows))


if __name__ == "__main__":
    main()
