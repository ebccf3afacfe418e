"""Merging sharded checkpoints beside mergekit and a plain copy of the same bytes.

Two random Llama-shaped checkpoints (0.45B parameters, bfloat16, 5 shards) are merged by each method; the arms take turns, every run is a
process of its own, the median counts. The highest resident memory is the process's own, less what it has after its imports.

mergekit wants packages of other versions, so it lives in an environment of its own:

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit
    python -m benchmarks.merge --mergekit mk/bin/mergekit-yaml --rounds 3

``--seven`` merges two checkpoints of the shape of a 7B model instead and prints the memory. They are written with holes, so that they take no space
on disk; the result takes 13 GB.

    python -m benchmarks.merge --seven --methods linear ties
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARD = 180_000_000

OURS = {
    "linear": "merge linear of one, two",
    "slerp": "merge slerp(t = 0.5) of one, two",
    "ties": "merge ties(density = 50%, trim = tensor, elect = weighted, divide = weight) of one, two",
    "dare_ties": "merge dare_ties(density = 50%, rescale = l1, elect = weighted, divide = weight) of one, two",
}
THEIRS = {
    "linear": {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1}}, {"model": "two", "parameters": {"weight": 1}}]},
    "slerp": {"merge_method": "slerp", "base_model": "one", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"t": 0.5}},
    "ties": {
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 1.0},
        "models": [{"model": "one"}, {"model": "two"}],
    },
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 1.0},
        "models": [{"model": "one"}, {"model": "two"}],
    },
}  # fmt: skip


def write_models(folder: Path) -> None:
    """Three seeded checkpoints of one shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures", "dtype")}))
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size=SHARD)


def write_seven(folder: Path, layers: int = 32) -> None:
    """Three bf16 checkpoints of the shape of a 7B Llama whose tensors are all zeros and stand nowhere: headers, and files with holes."""
    from surgery.model.shards import header_bytes, plan_shards

    hidden, inner, words = 4096, 11008, 32000
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": words,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
        }
        shapes |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    shards = plan_shards({n: 2 * math.prod(s) for n, s in shapes.items()})
    for name in ("base", "one", "two"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
        files = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            header = header_bytes(names, shapes, dict.fromkeys(names, "bfloat16"), {"format": "pt"})
            with open(folder / name / file, "wb") as out:
                out.write(header)
                out.truncate(len(header) + sum(2 * math.prod(shapes[n]) for n in names))
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(2 * math.prod(s) for s in shapes.values())}, "weight_map": files}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def timed(command: list[str], folder: Path, threads: int) -> tuple[float, float]:
    """Seconds and the highest resident MiB of a process."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    before = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read() if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 1024


def copied(folder: Path) -> float:
    """Seconds of reading and writing the bytes of two checkpoints, as a plain copy does, to disk."""
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    before = time.perf_counter()
    for name in ("one", "two"):
        shutil.copytree(folder / name, target / name)
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit", help="path of mergekit-yaml; without it only surgery and the copy are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(OURS))
    parser.add_argument("--seven", action="store_true", help="memory of merging two checkpoints of the shape of a 7B model")
    parser.add_argument("--layers", type=int, default=32, help="layers of those")
    args = parser.parse_args()
    kit = os.path.abspath(args.mergekit) if args.mergekit else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.seven:
            write_seven(folder, args.layers)
            kit, args.rounds = None, 1
        else:
            write_models(folder)
        inputs = 'model "base"\ncheckpoint one = load("one")\ncheckpoint two = load("two")\n'
        start = [sys.executable, "-c", "import surgery.driver, surgery.backends.to_transformers, transformers.models.llama.modeling_llama"]
        idle = timed(start, folder, args.threads)
        results: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            if not args.seven:
                results.setdefault("copy of both", []).append((copied(folder), 0.0))
            for method in args.methods:
                (folder / "ours.surg").write_text(f'surg 1\n{inputs}{OURS[method]}\nemit transformers to "ours"\n')
                command = [sys.executable, "-m", "surgery", "compile", "ours.surg", "--force", "--quiet"]
                results.setdefault(f"{method}: surgery", []).append(timed(command, folder, args.threads))
                if kit:
                    (folder / "theirs.yml").write_text(json.dumps({**THEIRS[method], "dtype": "bfloat16"}))
                    shutil.rmtree(folder / "theirs", ignore_errors=True)
                    command = [kit, "theirs.yml", "theirs", "--no-copy-tokenizer", "--lazy-unpickle", "--no-write-model-card"]
                    results.setdefault(f"{method}: mergekit", []).append(timed(command, folder, args.threads))
        print(f"imports alone: {idle[0]:.1f} s, {idle[1]:.0f} MiB; {resource.getpagesize()} bytes a page")
        print("| what | s | peak MiB |\n|---|---|---|")
        for what, runs in results.items():
            peak = statistics.median(r[1] for r in runs)
            print(f"| {what} | {statistics.median(r[0] for r in runs):.1f} | {f'{peak:.0f}' if peak else ''} |")


if __name__ == "__main__":
    main()
