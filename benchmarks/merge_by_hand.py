"""Other ways to merge two sharded checkpoints, and to fold one LoRA into one: peft's, and loops written by hand for these cases alone.

    python -m benchmarks.merge_by_hand peft|streamed|fold BASE ADAPTER TARGET SHARD
    python -m benchmarks.merge_by_hand linear|slerp ONE TWO TARGET

``streamed`` is what one writes in a minute. ``linear``, ``slerp`` and ``fold`` are made for speed and check nothing: two threads take the shards in turn, chunks
stay in a core's cache, what does not change is copied by the system, and what was written is flushed at the end. They say how fast this machine can be
with these bytes: the least time that a tool which also plans, hashes, proves and reads back could aim at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CHUNK = 1 << 16
"""Elements that are worked on at a time, about."""


def peft(base: Path, adapter: Path, target: Path, shard: int) -> None:
    """The whole model in memory, its adapter beside it, merged and saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target, max_shard_size=shard)


def streamed(base: Path, adapter: Path, target: Path) -> None:
    """One shard after the other; the product is formed in float32 and rounded once."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    target.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
            continue
        made = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():
                value = stored.get_tensor(name)
                at = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{at}.lora_A.weight" in factors:
                    wide = value.float().addmm_(factors[f"{at}.lora_B.weight"], factors[f"{at}.lora_A.weight"], alpha=scale)
                    value = wide.to(value.dtype)
                made[name] = value
        save_file(made, target / file.name, {"format": "pt"})


# ---------------------------------------------------------------- as fast as this machine can


class Shard:
    """One file of each model side by side, which have the same layout, and the file that is written."""

    def __init__(self, target: Path, *sources: Path) -> None:
        self.target = target
        self.inputs = [os.open(s, os.O_RDONLY) for s in sources]
        (length,) = struct.unpack("<Q", os.pread(self.inputs[0], 8, 0))
        self.start = 8 + length
        self.table: dict[str, Any] = json.loads(os.pread(self.inputs[0], length, 8))
        self.table.pop("__metadata__", None)
        self.out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.copy(0, self.start)

    def copy(self, start: int, stop: int) -> None:
        os.lseek(self.out, start, os.SEEK_SET)
        while start < stop:
            start += os.copy_file_range(self.inputs[0], self.out, stop - start, start, start)

    def close(self) -> None:
        os.fsync(self.out)
        for handle in (*self.inputs, self.out):
            os.close(handle)


class Work:
    """Buffers of one thread."""

    def __init__(self, inputs: int) -> None:
        self.stored = [torch.empty(4 * CHUNK, dtype=torch.bfloat16) for _ in range(inputs)]
        self.wide = [torch.empty(4 * CHUNK) for _ in range(3)]
        self.made = torch.empty(4 * CHUNK, dtype=torch.bfloat16)

    def read(self, shard: Shard, i: int, at: int, count: int) -> Tensor:
        piece = self.stored[i][:count]
        os.preadv(shard.inputs[i], [memoryview(piece.view(torch.uint8).numpy())], at)
        return piece

    def write(self, shard: Shard, wide: Tensor, at: int) -> None:
        piece = self.made[: wide.numel()].copy_(wide.view(-1))
        os.pwrite(shard.out, memoryview(piece.view(torch.uint8).numpy()), at)


def merge(shard: Shard, factors: Any) -> None:
    """``factors(work, shard, begin, end)`` are those of the two models for the tensor at bytes ``begin`` to ``end``."""
    work = Work(2)
    for entry in shard.table.values():
        begin, end = (shard.start + n for n in entry["data_offsets"])
        left, right = factors(work, shard, begin, end)
        for at in range(begin, end, 2 * CHUNK):
            count = min(CHUNK, (end - at) // 2)
            total = work.wide[0][:count].copy_(work.read(shard, 0, at, count)).mul_(left)
            term = work.wide[1][:count].copy_(work.read(shard, 1, at, count))
            work.write(shard, total.add_(term, alpha=right), at)


def halves(work: Work, shard: Shard, begin: int, end: int) -> tuple[float, float]:
    return 0.5, 0.5


def arcs(work: Work, shard: Shard, begin: int, end: int) -> tuple[float, float]:
    """The factors of spherical interpolation half way."""
    sums = [0.0, 0.0, 0.0]
    for at in range(begin, end, 2 * CHUNK):
        count = min(CHUNK, (end - at) // 2)
        u, v = (work.wide[i][:count].copy_(work.read(shard, i, at, count)) for i in range(2))
        for i, (p, q) in enumerate(((u, u), (v, v), (u, v))):
            sums[i] += float(torch.dot(p, q))
    angle = math.acos(sums[2] / math.sqrt(sums[0] * sums[1]))
    return (math.sin(angle / 2) / math.sin(angle),) * 2 if abs(math.cos(angle)) <= 0.9995 else (0.5, 0.5)


def fold(shard: Shard, factors: dict[str, Tensor], scale: float) -> None:
    work = Work(1)
    for name, entry in shard.table.items():
        begin, end = (shard.start + n for n in entry["data_offsets"])
        at = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{at}.lora_A.weight" not in factors:
            shard.copy(begin, end)
            continue
        a, b = factors[f"{at}.lora_A.weight"], factors[f"{at}.lora_B.weight"]
        rows, columns = entry["shape"]
        many = max(1, CHUNK // columns)
        for first in range(0, rows, many):
            last = min(rows, first + many)
            place, count = begin + 2 * first * columns, (last - first) * columns
            wide = work.wide[0][:count].copy_(work.read(shard, 0, place, count)).view(last - first, columns)
            work.write(shard, wide.addmm_(b[first:last], a, alpha=scale), place)


def beside(run: Any, target: Path, *sources: Path) -> None:
    """``run`` on every shard, two at a time; other files are copied."""
    target.mkdir(parents=True)
    torch.set_num_threads(1)
    files = sorted(sources[0].iterdir())

    def one(file: Path) -> None:
        shard = Shard(target / file.name, *(s / file.name for s in sources))
        run(shard)
        shard.close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, (f for f in files if f.suffix == ".safetensors")))
    for file in files:
        if file.suffix != ".safetensors":
            shutil.copy(file, target)


def main() -> None:
    way, *rest = sys.argv[1:]
    first, second, target = (Path(name) for name in rest[:3])
    if way == "peft":
        peft(first, second, target, int(rest[3]))
    elif way == "streamed":
        streamed(first, second, target)
    elif way == "fold":
        factors = load_file(second / "adapter_model.safetensors")
        config = json.loads((second / "adapter_config.json").read_text())
        beside(lambda shard: fold(shard, factors, config["lora_alpha"] / config["r"]), target, first)
    else:
        beside(lambda shard: merge(shard, {"linear": halves, "slerp": arcs}[way]), target, first, second)


if __name__ == "__main__":
    main()
