"""Merges of tiny float32 checkpoints beside mergekit's, tensor by tensor: bit for bit where the formula is the same.

mergekit runs under a python of its own (see :mod:`benchmarks.merge`), once for all methods:

    python -m benchmarks.merge_equal --mergekit mk/bin/python

Methods that draw at random cannot give the same tensors: of mergekit's result the mask is read off (where it differs from the base), surgery's formula is
applied to this mask, and the shares of entries that stayed are told side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import ROOT, table

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NAMES = ("base", "one", "two", "three")
PEER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for name, config in json.load(open("cases.json")).items():
    made = MergeConfiguration.model_validate(config)
    run_merge(made, f"theirs/{name}", options=MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=1))
"""


@dataclass(frozen=True)
class Case:
    """A merge in both languages. ``models`` are the names and factors of mergekit's; ``drawn`` says that entries are dropped at random."""

    ours: str
    theirs: str
    models: tuple[tuple[str, float], ...] = (("one", 1.0), ("two", 1.0))
    shared: dict[str, Any] = field(default_factory=dict)
    base: str | None = "base"
    drawn: float = 0.0


UNEVEN = (("one", 0.7), ("two", 0.4))
THREE = (("one", 0.7), ("two", 0.4), ("three", 1.3))
COMMON = "elect = weighted, divide = weight"
CASES = {
    "linear": Case("linear of one * 0.7, two * 0.4, three * 1.3", "linear", THREE, base=None),
    "linear, not normalized": Case("linear(normalize = false) of one * 0.7, two * 0.4", "linear", UNEVEN, {"normalize": False}, None),
    "slerp": Case("slerp(t = 0.3) of one, two", "slerp", shared={"t": 0.3}, base="one"),
    "nuslerp, whole": Case("nuslerp of one * 0.7, two * 0.4", "nuslerp", UNEVEN, base=None),
    "nuslerp, rows": Case("nuslerp(along = row) of one * 0.7, two * 0.4", "nuslerp", UNEVEN, {"nuslerp_flatten": False}, None),
    "nuslerp, columns": Case(
        "nuslerp(along = column) of one * 0.7, two * 0.4", "nuslerp", UNEVEN, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, None
    ),
    "nuslerp, deltas": Case("nuslerp(deltas = true) of one * 0.7, two * 0.4", "nuslerp", UNEVEN),
    "task_arithmetic": Case("task_arithmetic of one * 0.7, two * 0.4, three * 1.3", "task_arithmetic", THREE),
    "task_arithmetic, scaled": Case("task_arithmetic(scale = 0.6) of one * 0.7, two * 0.4", "task_arithmetic", UNEVEN, {"lambda": 0.6}),
    "ties": Case(f"ties(density = 50%, trim = tensor, {COMMON}) of one, two", "ties", shared={"density": 0.5}),
    "ties, factors": Case(
        f"ties(density = 3%, trim = tensor, {COMMON}, scale = 0.6) of one * 0.7, two * 0.4, three * 1.3", "ties", THREE, {"density": 0.03, "lambda": 0.6}
    ),
    "ties, not normalized": Case(
        "ties(density = 50%, trim = tensor, elect = weighted, divide = none) of one * 0.7, two * 0.4", "ties", UNEVEN, {"density": 0.5, "normalize": False}
    ),
    "breadcrumbs": Case(
        "breadcrumbs(density = 60%, gamma = 5%, per = tensor, scale = 1) of one * 0.7, two * 0.4", "breadcrumbs", UNEVEN, {"density": 0.6, "gamma": 0.05}
    ),
    "breadcrumbs, dense": Case(
        "breadcrumbs(density = 99%, gamma = 5%, per = tensor, scale = 1) of one, two", "breadcrumbs", shared={"density": 0.99, "gamma": 0.05}
    ),
    "model_stock": Case("model_stock of one, two, three", "model_stock", (("one", 1.0), ("two", 1.0), ("three", 1.0))),
    "model_stock, rows": Case("model_stock(rows = true) of one, two", "model_stock", shared={"filter_wise": True}),
    "dare_linear": Case("dare(density = 40%, rescale = l1) of one", "dare_linear", (("one", 1.0),), {"density": 0.4}, drawn=0.4),
    "dare_ties": Case(
        f"dare_ties(density = 40%, rescale = l1, {COMMON}) of one", "dare_ties", (("one", 1.0),), {"density": 0.4, "normalize": True}, drawn=0.4
    ),
    "dare_ties, not normalized": Case(
        "dare_ties(density = 40%, rescale = l1, elect = weighted, divide = none) of one * 0.5", "dare_ties", (("one", 0.5),), {"density": 0.4}, drawn=0.4
    ),
    "della": Case(
        "della(density = 40%, epsilon = 15%, rescale = l1) of one", "della", (("one", 1.0),), {"density": 0.4, "epsilon": 0.15}, drawn=0.4
    ),
}  # fmt: skip


def write_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=False))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        model.save_pretrained(name)


def config_of(case: Case) -> dict[str, Any]:
    weighted = case.theirs not in ("slerp", "model_stock")
    models = [{"model": n, **({"parameters": {"weight": w}} if weighted else {})} for n, w in case.models]
    made = {"merge_method": case.theirs, "models": models, "dtype": "float32", "parameters": case.shared}
    return made | ({"base_model": case.base} if case.base else {})


def merged(case: Case) -> dict[str, Tensor]:
    import surgery

    head = 'surg 1\nmodel "base"\n' + "".join(f'checkpoint {n} = load("{n}")\n' for n in NAMES[1:])
    surgery.compile(f'{head}merge {case.ours}\nemit transformers to "ours"\n', force=True)
    return load_file("ours/model.safetensors")


def compared(ours: dict[str, Tensor], theirs: dict[str, Tensor], largest: float) -> tuple[str, str]:
    """How far apart, and the verdict."""
    differ = sum(int((ours[n] != theirs[n]).sum()) for n in ours)
    total = sum(t.numel() for t in ours.values())
    worst = max(float((ours[n] - theirs[n]).abs().max()) for n in ours)
    if not differ:
        return "0", "bit for bit"
    share = worst / (largest * 2**-23)
    return f"{worst:.1e}", f"{100 * differ / total:.2f} % differ, by at most {share:.1f} roundings of the largest element" + (
        "" if share <= 4 else ": DIFFERENT"
    )


def by_mask(case: Case, base: dict[str, Tensor], one: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[str, str]:
    """mergekit's random result from its own mask by surgery's formula, and how much stayed."""
    ours = merged(case)
    worst, stayed, mine, total = 0.0, 0, 0, 0
    for name, start in base.items():
        tau = one[name] - start
        keep = theirs[name] != start
        left = torch.where(keep, tau, torch.zeros(()))
        change = left * (tau.double().abs().sum() / left.double().abs().sum().clamp_min(1e-30)).float() * case.models[0][1]
        worst = max(worst, float((start + change - theirs[name]).abs().max()))
        stayed += int(keep.sum())
        mine += int((ours[name] != start).sum())
        total += keep.numel()
    spread = math.sqrt(case.drawn * (1 - case.drawn) / total)
    fine = all(abs(n / total - case.drawn) < 5 * spread for n in (stayed, mine)) and worst < 1e-6
    text = f"{stayed / total:.4f} stayed there, {mine / total:.4f} here, {case.drawn} meant (± {5 * spread:.4f})"
    return f"{worst:.1e}", text + ("" if fine else ": DIFFERENT")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mergekit", required=True, help="python of an environment with mergekit")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    kit = str(Path(args.mergekit).absolute())
    sys.path.insert(0, str(ROOT))
    import os

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_models()
        Path("cases.json").write_text(json.dumps({str(i): config_of(CASES[c]) for i, c in enumerate(args.cases)}))
        subprocess.run([kit, "-c", PEER], check=True, stdout=subprocess.DEVNULL)
        base, one = (load_file(f"{n}/model.safetensors") for n in ("base", "one"))
        largest = max(float(t.abs().max()) for t in base.values())
        lines: list[tuple[str, ...]] = [("method", "largest difference", "what it is")]
        for i, name in enumerate(args.cases):
            theirs = {k: v for f in sorted(Path(f"theirs/{i}").glob("*.safetensors")) for k, v in load_file(f).items()}
            case = CASES[name]
            lines.append((name, *(by_mask(case, base, one, theirs) if case.drawn else compared(merged(case), theirs, largest))))
        print(table(lines))
        os.chdir(ROOT)
    if any(line[2].endswith("DIFFERENT") for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
