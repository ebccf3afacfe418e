"""Start-up figures: ``check`` cold, ``plan`` of a 70B-shaped config, the quickstart, loading an artifact, the analyses.

    python -m benchmarks.start [--rounds 5] [--threads 2]

Every figure of a command is that of a fresh process, imports included; the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, table

SEVENTY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SPEC = 'surg 1\nmodel "config:{config}"\nadapt lora(rank = 16) on layers[*].attn.{{q, k, v, o}}, layers[*].ffn.{{up, gate, down}}\nexpect trainable <= 1%\n'
LOAD = "import time, torch, transformers, surgery.driver as d; t = time.perf_counter(); d.load({path!r}); first = time.perf_counter() - t; t = time.perf_counter(); d.load({path!r}); print(first, time.perf_counter() - t)"
ANALYSE = """
import json, sys, time
from surgery.opening import open_program
from surgery.model.anatomy import find_anatomy
program, _ = open_program({ref!r})
spent = []
for _ in range(5):
    start = time.perf_counter(); find_anatomy(program); spent.append(time.perf_counter() - start)
print(sorted(spent)[2])
"""


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """Seconds, peak MiB of the child, its output."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.communicate()
    spent = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"{command}: {err[-1500:]}")
    return spent, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    surgery = [sys.executable, "-m", "surgery.cli.main"]
    rows: list[tuple[str, ...]] = [("what", "target", "measured")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "SURGERY_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        check = [timed([*surgery, "check", "specs/quickstart.surg"], env)[0] for _ in range(4 * args.rounds)]
        rows.append(("surgery check, cold", "0.2 s", f"{statistics.median(check):.3f} s"))

        (folder / "config.json").write_text(json.dumps(SEVENTY))
        spec = folder / "seventy.surg"
        spec.write_text(SPEC.format(config=folder))
        first, cached = [], []
        for _ in range(args.rounds):
            for path in sorted((folder / "cache").rglob("*")):
                if path.is_file():
                    path.unlink()
            first.append(timed([*surgery, "plan", str(spec)], env)[0])
            cached.append(timed([*surgery, "plan", str(spec)], env)[0])
        peak = timed([*surgery, "plan", str(spec), "--no-cache"], env)[1]
        rows.append(("plan, 70B-shaped, first time", "12 s", f"{statistics.median(first):.2f} s"))
        rows.append(("plan, 70B-shaped, from the capture cache", "5 s", f"{statistics.median(cached):.2f} s"))
        rows.append(("plan, 70B-shaped, peak memory", "1 GiB", f"{peak:.0f} MiB"))

        found = []
        for _ in range(args.rounds):
            for path in sorted((folder / "cache").rglob("*")):
                if path.is_file():
                    path.unlink()
            found.append(timed([*surgery, "compile", "specs/quickstart.surg", "--out", str(folder / "out"), "--force"], env)[0])
        warm = [
            timed([*surgery, "compile", "specs/quickstart.surg", "--out", str(folder / "out"), "--force"], env)[0]
            for _ in range(args.rounds)
        ]
        rows.append(("quickstart compile, empty cache", "20 s", f"{statistics.median(found):.1f} s"))
        rows.append(("quickstart compile, capture cached", "20 s", f"{statistics.median(warm):.1f} s"))

        artifact = str(folder / "out" / "build" / "minilm-lora")
        load = [[float(x) for x in timed([sys.executable, "-c", LOAD.format(path=artifact)], env)[2].split()] for _ in range(args.rounds)]
        rows.append(("load the artifact, after imports", "0.5 s", f"{statistics.median(x[1] for x in load):.3f} s"))
        rows.append(("the same with the imports that the first load makes", "", f"{statistics.median(x[0] for x in load):.3f} s"))

        small = folder / "deep"
        small.mkdir()
        deep = {
            **SEVENTY,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        }
        (small / "config.json").write_text(json.dumps(deep))
        anatomy = float(timed([sys.executable, "-c", ANALYSE.format(ref=f"config:{small}")], env)[2].split()[-1])
        rows.append(("classes and roles, 32-layer decoder", "0.5 s", f"{anatomy:.3f} s"))
    print(table(rows))


if __name__ == "__main__":
    main()
