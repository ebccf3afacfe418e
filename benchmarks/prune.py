"""Pruning: the cut beside torch-pruning's, and a sharded checkpoint beside a plain copy of it.

    python -m benchmarks.prune cut [--rounds 7] [--threads 2]
    python -m benchmarks.prune whole [--rounds 5] [--threads 2] [--limit 300]
    python -m benchmarks.prune shards [--rounds 3] [--layers 12] [--without-compile]

``cut`` removes a quarter of the hidden units of every feed-forward block, on three models with random weights. Ours is the analysis of a captured program and the rewriting
of graph and weights, with and without computing the new tensors. Theirs (``pip install torch-pruning``; left out without it) is measured twice: its pruner as
it is meant to be used (``MagnitudePruner`` with everything else ignored, which scores as well), and the dependency graph with one group asked for
by hand for each block, of the very units that ours took; that result is run on the same inputs and compared. Each model is measured in a
process of its own, after two rounds that do not count. Garbage is collected as seldom in all arms as the command line does.

``whole`` removes a quarter of everything: hidden units, heads (whole key-value groups) and the residual width, which takes us three statements with an
analysis each and torch-pruning one ``MagnitudePruner`` over all layers. Both sides choose their own units, so outputs are not compared; the share of the parameters
that is left is printed; two rounds of both sides do not count. A model that takes the peer longer than ``--limit`` seconds is given up.

``shards`` writes a Llama-shaped checkpoint in bf16 and prunes it without data, by magnitude. Each figure is of a process of its own: a plain copy
of the files (read and written); a compile that chooses, cuts, hashes what it reads and writes, and checks what was written (loaded = program: every byte
is read back, the graph is compared); and one that also runs the model before and after (removed = masked). Both have planned once before,
so that they measure no imports.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import child, peak_mib, table
from benchmarks.prune_models import checkpoint, models
from surgery.model.weights import Select

WHOLE = "surg 1\n\nprune ffn(ratio = 25%) on layers[*].ffn\nprune {heads}(ratio = 25%) on layers[*].attn\nprune width(ratio = 25%)\n"
SPEC = "surg 1\n\nprune ffn(ratio = 25%) on layers[*].ffn\n"


WARM_UP = 2
"""Rounds of the cut that are not counted, of every arm: what is done once in a process is not what is compared."""


# ---------------------------------------------------------------- the cut


def ours(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(a fresh program with nothing analysed, the statement) as functions, from one capture."""
    from surgery.driver import load_spec
    from surgery.opening import capture

    program = capture(model, inputs)
    return program, load_spec(SPEC).statements[0]


def cut(program: Any, statement: Any) -> None:
    from surgery.passes.resolve import resolve
    from surgery.session import apply

    apply(program, resolve(program, statement))


def realised(program: Any, before: Any) -> dict[str, torch.Tensor]:
    """The tensors that the cut changed."""
    from surgery.model.realise import Realiser

    changed = {n: e for n, e in program.weights.items() if e is not before.weights[n]}
    values = Realiser(changed)
    return {name: values[name] for name in changed}


def removed(program: Any, path: str) -> list[int]:
    """The outputs of a projection that the cut took."""
    expr = program.weights[f"{path}.weight"]
    assert isinstance(expr, Select) and expr.axis == 0
    kept = {i for start, stop in expr.ranges for i in range(start, stop)}
    return [i for i in range(expr.source.shape[0]) if i not in kept]


def theirs(model: nn.Module, inputs: dict[str, Any], units: dict[str, list[int]]) -> None:
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists every norm that is no module of torch
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    for path, gone in units.items():
        graph.get_pruning_group(model.get_submodule(path), tp.prune_linear_out_channels, idxs=gone).prune()


def their_pruner(model: nn.Module, inputs: dict[str, Any], paths: list[tuple[str, ...]]) -> None:
    import torch_pruning as tp

    ours = {path for block in paths for path in block}
    ignored = [m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in ours]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MagnitudePruner(
            model, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.25, ignored_layers=ignored
        )
        pruner.step()
    width = model.config.intermediate_size  # type: ignore[union-attr]
    assert all(model.get_submodule(path).out_features == width * 3 // 4 for path in ours), "the pruner took something else"


def outputs_of(module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(**inputs)[0]
    return found


def cut_here(at: int, rounds: int, threads: int) -> dict[str, float]:
    """In this process, which holds no other model: median seconds of each arm on one model, and by how much the outputs differ."""
    gc.set_threshold(200_000, 20, 100)
    torch.set_num_threads(threads)
    peer = importlib.util.find_spec("torch_pruning") is not None
    model, inputs, paths = list(models().values())[at]()
    program, statement = ours(model, inputs)
    times: dict[str, list[float]] = {"cut": [], "tensors": [], **({"peer": [], "pruner": []} if peer else {})}
    for done in range(WARM_UP + rounds):
        if done == WARM_UP:
            times = {arm: [] for arm in times}
        mine = program.copy()
        gc.collect()  # each arm clears up after itself only
        start = time.perf_counter()
        cut(mine, statement)
        times["cut"].append(time.perf_counter() - start)
        realised(mine, program)
        times["tensors"].append(time.perf_counter() - start)
        if peer:
            live, units = deepcopy(model), {first: removed(mine, first) for first, *_ in paths}
            gc.collect()
            start = time.perf_counter()
            theirs(live, inputs, units)
            times["peer"].append(time.perf_counter() - start)
            other = deepcopy(model)
            gc.collect()
            start = time.perf_counter()
            their_pruner(other, inputs, paths)
            times["pruner"].append(time.perf_counter() - start)
    found = {k: statistics.median(v) for k, v in times.items()}
    if peer:
        found["gap"] = float((outputs_of(live, inputs) - outputs_of(module_of(mine), inputs)).abs().max())
    return found


def compare_cuts(rounds: int, threads: int) -> None:
    rows: list[tuple[str, ...]] = [
        ("model", "ours: analysis + cut", "with tensors", "torch-pruning: pruner", "ratio", "groups by hand", "ratio", "outputs differ by")
    ]
    for at, name in enumerate(models()):
        found = child("prune", "cut", str(at), str(rounds), str(threads))
        row = [name, f"{found['cut']:.3f} s", f"{found['tensors']:.3f} s", "", "", "", "", ""]
        if "gap" in found:
            both = [text for k in ("pruner", "peer") for text in (f"{found[k]:.3f} s", f"{found[k] / found['tensors']:.1f}")]
            row[3:] = [*both, f"{found['gap']:.1e}"]
        rows.append(tuple(row))
        print(row, file=sys.stderr)
    if not rows[1][3]:
        print("torch-pruning is not installed: its columns are empty", file=sys.stderr)
    print(table(rows))


def module_of(program: Any) -> nn.Module:
    from surgery.model.live import Tensors
    from surgery.model.realise import no_functions
    from surgery.model.runtime import build_module

    return build_module(program, Tensors(no_functions).all(program)).eval()


# ---------------------------------------------------------------- everything


def whole_by_peer(at: int, rounds: int, threads: int) -> dict[str, float]:
    """In this process: median seconds of torch-pruning's pruner over the whole of one model, and the share of its parameters that is left."""
    import torch_pruning as tp

    gc.set_threshold(200_000, 20, 100)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model, inputs, _ = list(models().values())[at]()
    times = []
    for _ in range(WARM_UP + rounds):
        live = deepcopy(model)
        heads: dict[nn.Module, int] = {}
        for name, module in live.named_modules():
            if name.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj")):
                count = "num_key_value_heads" if name.endswith(("k_proj", "v_proj")) else "num_attention_heads"
                heads[module] = getattr(live.config, count, live.config.num_attention_heads)
        start = time.perf_counter()
        tp.pruner.MagnitudePruner(
            live, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.25, num_heads=heads, prune_num_heads=True,
            head_pruning_ratio=0.25, ignored_layers=[m for n, m in live.named_modules() if n == "lm_head"],
        ).step()  # fmt: skip
        times.append(time.perf_counter() - start)
    left = sum(p.numel() for p in live.parameters()) / sum(p.numel() for p in model.parameters())
    return {"seconds": statistics.median(times[WARM_UP:]), "left": left}


def compare_whole(rounds: int, threads: int, limit: int) -> None:
    from surgery.driver import load_spec
    from surgery.model.cost import parameters

    gc.set_threshold(200_000, 20, 100)
    rows: list[tuple[str, ...]] = [
        ("model", "ours: analyses + cuts", "with tensors", "left", "torch-pruning", "left", "ratio", "ratio with tensors")
    ]
    for at, (name, case) in enumerate(models().items()):
        model, inputs, _ = case()
        program, _ = ours(model, inputs)
        heads = "kv_groups" if "Llama" in name else "heads"
        statements = load_spec(WHOLE.format(heads=heads)).statements
        times: dict[str, list[float]] = {"cut": [], "tensors": []}
        for _ in range(WARM_UP + rounds):
            mine = program.copy()
            start = time.perf_counter()
            for statement in statements:
                cut(mine, statement)
            times["cut"].append(time.perf_counter() - start)
            realised(mine, program)
            times["tensors"].append(time.perf_counter() - start)
        middle = {k: statistics.median(v[WARM_UP:]) for k, v in times.items()}
        row = [name, f"{middle['cut']:.3f} s", f"{middle['tensors']:.3f} s", f"{parameters(mine) / parameters(program):.1%}"]
        try:
            theirs = child("prune", str(at), str(rounds), str(threads), timeout=limit)
        except subprocess.TimeoutExpired:
            row += [f"more than {limit} s", "", *(f"> {limit / (WARM_UP + rounds) / middle[k]:.0f}" for k in ("cut", "tensors"))]
        else:
            row += [
                f"{theirs['seconds']:.3f} s",
                f"{theirs['left']:.1%}",
                *(f"{theirs['seconds'] / middle[k]:.1f}" for k in ("cut", "tensors")),
            ]
        rows.append(tuple(row))
        print(row, file=sys.stderr)
    print(table(rows))


# ---------------------------------------------------------------- a sharded checkpoint


def copied(source: Path, target: Path) -> None:
    """Every byte read and written, 8 MiB at a time (no reflink, no copy inside the kernel)."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb") as read, open(target / path.name, "wb") as write:
            while block := read.read(8 << 20):
                write.write(block)


def arm(name: str, source: Path, target: Path) -> dict[str, float]:
    """One arm in this process: seconds of its work, peak MiB, and MiB when its imports were done."""
    from benchmarks.common import resident_mib

    if name == "copy":
        start = time.perf_counter()
        copied(source, target)
        return {"seconds": time.perf_counter() - start, "peak": peak_mib(), "before": 0.0}
    import surgery
    from surgery import driver

    gc.set_threshold(200_000, 20, 100)  # as the command line does
    spec = target.with_suffix(".surg")
    spec.write_text(SPEC + f'emit torch to "{target.name}"\n')
    driver._walk(driver.load_spec(spec), str(source), keep_base=False)  # imports, capture and plan
    if name == "prune":
        from surgery.compiling import Compilation

        Compilation.settle = lambda self, claim: None  # type: ignore[method-assign]  # the model is run in the third arm only
    before = resident_mib()
    start = time.perf_counter()
    done = surgery.compile(spec, str(source), out=target.parent)
    assert [c["claim"] for c in done.certificates][-1] == "loaded = program" and done.certificates[-1]["bytes"] > 1 << 20
    return {"seconds": time.perf_counter() - start, "peak": peak_mib(), "before": before}


def compare_shards(rounds: int, layers: int, whole: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model"
        total, largest = checkpoint(source, layers)
        found: dict[str, list[dict[str, Any]]] = {"copy": [], "prune": [], **({"compile": []} if whole else {})}
        for _ in range(rounds):
            for which in found:
                target = folder / f"out-{which}"
                found[which].append(child("prune", which, str(source), str(target)))
                shutil.rmtree(target)
        rows: list[tuple[str, ...]] = [("what", "seconds", "MiB read / s", "share of the copy", "peak, MiB", "of it imports")]
        plain = statistics.median(r["seconds"] for r in found["copy"])
        for which, results in found.items():
            seconds = statistics.median(r["seconds"] for r in results)
            peak, before = (statistics.median(r[k] for r in results) for k in ("peak", "before"))
            text = {"copy": "plain copy", "prune": "choose, cut, write, check", "compile": "the whole compile, claims measured"}[which]
            rows.append(
                (text, f"{seconds:.2f}", f"{total / seconds / 2**20:.0f}", f"{plain / seconds:.0%}", f"{peak:.0f}", f"{before:.0f}")
            )
    print(
        f"{total / 2**30:.2f} GiB in bf16, largest tensor {largest / 2**20:.0f} MiB: 3 x largest + 0.5 GiB = {3 * largest / 2**20 + 512:.0f} MiB"
    )
    print(table(rows))


def main() -> None:
    if "--child" in sys.argv:
        which, source, target, *more = sys.argv[sys.argv.index("--child") + 1 :]
        if which == "cut":
            print(json.dumps(cut_here(int(source), int(target), int(more[0]))))
            return
        if which.isdigit():
            print(json.dumps(whole_by_peer(int(which), int(source), int(target))))
            return
        print(json.dumps(arm(which, Path(source), Path(target))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cut", "whole", "shards"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds that the peer may take with a whole model, all rounds together")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--without-compile", action="store_true", help="leave out the arm that measures claims")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "cut":
        compare_cuts(args.rounds, args.threads)
    elif args.what == "whole":
        compare_whole(args.rounds, args.threads, args.limit)
    else:
        compare_shards(args.rounds, args.layers, not args.without_compile)


if __name__ == "__main__":
    main()
