"""LoRA: one training step of the emitted module beside peft on the same model, and the cost of injecting the adapters.

    python -m benchmarks.lora_step [--rounds 15] [--threads 2]

Time: median of interleaved steps (forward, backward, AdamW) in one process. Memory: bytes that autograd keeps between forward
and backward (exact, by tensor storage), and the peak resident memory of a process of its own for each arm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import ROOT, child, interleaved, peak_mib, resident_mib, table

SPEC = 'surg 1\nmodel "{model}"\nadapt lora(rank = 8, alpha = 16, dropout = {dropout}%) on layers[*].attn.{{q, v}}\nemit torch to "{out}"\n'
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
CASES = {"minilm": ("minilm", ["query", "value"], 8, 64), "llama": ("", ["q_proj", "v_proj"], 8, 64)}


def reference(folder: Path, case: str) -> str:
    if case == "minilm":
        return "minilm"
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA))
    return f"config:{folder}"


def live(case: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if case == "minilm":
        from surgery.model.checkpoint import open_checkpoint

        return AutoModel.from_pretrained(str(open_checkpoint("minilm").path))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))


def emitted(folder: Path, case: str, dropout: int) -> Path:
    """The artifact, compiled into ``folder``."""
    import surgery

    out = folder / f"{case}-{dropout}"
    surgery.compile(SPEC.format(model=reference(folder, case), dropout=dropout, out=out), force=True)
    return out


def ours(artifact: Path) -> nn.Module:
    import surgery

    return surgery.load(artifact).train()


def theirs(case: str, dropout: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = CASES[case][1]
    return get_peft_model(live(case), LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout / 100, target_modules=targets)).train()


def batch(case: str) -> dict[str, torch.Tensor]:
    _, _, rows, length = CASES[case]
    ids = torch.randint(5, 8000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(case: str, model: nn.Module) -> torch.Tensor:
    more: dict[str, Any] = {} if case == "minilm" else {"use_cache": False}
    out = model(**batch(case), **more)
    return out.last_hidden_state.float().pow(2).mean() if case == "minilm" else out.logits.float().pow(2).mean()


class Step:
    def __init__(self, case: str, model: nn.Module) -> None:
        self.case, self.model = case, model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> None:
        loss_of(self.case, self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def saved_mib(case: str, model: nn.Module) -> float:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held.append(loss_of(case, model))
    return sum(kept.values()) / 2**20


def injection(case: str) -> dict[str, float]:
    """Milliseconds to put the adapters in: into a captured program, and by peft into a live model."""
    from peft import LoraConfig, get_peft_model

    from surgery.driver import load_spec
    from surgery.opening import open_program
    from surgery.passes.resolve import resolve
    from surgery.session import apply

    with tempfile.TemporaryDirectory() as name:
        ref = reference(Path(name), case)
        text = SPEC.format(model=ref, dropout=0, out="x")
        program, _ = open_program(ref)
        program.anatomy  # noqa: B018
        statement = next(s for s in load_spec(text).statements if s.call and s.call.name == "lora")
        times: dict[str, list[float]] = {"ours": [], "peft": []}
        for _ in range(5):
            copy = program.copy()
            copy._anatomy = program.anatomy
            start = time.perf_counter()
            apply(copy, resolve(copy, statement))
            times["ours"].append(1e3 * (time.perf_counter() - start))
            model = live(case)
            start = time.perf_counter()
            get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=CASES[case][1]))
            times["peft"].append(1e3 * (time.perf_counter() - start))
    return {k: sorted(v)[2] for k, v in times.items()}


def measure(folder: Path, case: str, dropout: int, args: argparse.Namespace) -> list[tuple[str, ...]]:
    artifact = emitted(folder, case, dropout)
    models = {"ours": ours(artifact), "peft": theirs(case, dropout)}
    arms: dict[str, Any] = {name: Step(case, model) for name, model in models.items()}
    if args.compiled and dropout == 0:
        arms["compiled"] = Step(case, torch.compile(ours(artifact)))  # type: ignore[arg-type]
    ms = interleaved(arms, args.rounds)
    rows = [(f"{case}, {dropout}%", "step, ms", f"{ms['ours']:.1f}", f"{ms['peft']:.1f}", f"{ms['ours'] / ms['peft']:.3f}")]
    if "compiled" in ms:
        rows.append(("", "compiled step, ms", f"{ms['compiled']:.1f}", f"{ms['peft']:.1f}", f"{ms['compiled'] / ms['peft']:.3f}"))
    kept = {name: saved_mib(case, model) for name, model in models.items()}
    rows.append(("", "kept for backward, MiB", f"{kept['ours']:.1f}", f"{kept['peft']:.1f}", f"{kept['ours'] / kept['peft']:.3f}"))
    del models, arms
    peak = {arm: child("lora_step", arm, case, str(dropout), str(artifact))["peak"] for arm in ("ours", "peft")}
    rows.append(("", "peak process, MiB", f"{peak['ours']:.0f}", f"{peak['peft']:.0f}", f"{peak['ours'] / peak['peft']:.3f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the emitted module")
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        arm, case, dropout, artifact = args.child
        model = ours(Path(artifact)) if arm == "ours" else theirs(case, int(dropout))
        step, before = Step(case, model), resident_mib()
        for _ in range(4):
            step()
        print(json.dumps({"peak": peak_mib(), "before": before}))
        return
    rows: list[tuple[str, ...]] = [("model, dropout", "what", "ours", "peft", "ours / peft")]
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            for dropout in (0, 5):
                rows += measure(Path(name), case, dropout, args)
            ms = injection(case)
            rows.append((case, "inject adapters, ms", f"{ms['ours']:.1f}", f"{ms['peft']:.1f}", f"{ms['ours'] / ms['peft']:.3f}"))
    print(f"torch {torch.__version__}, {args.threads} threads, rank 8 on query and value, AdamW, {ROOT.name}")
    print(table(rows))


if __name__ == "__main__":
    main()
