"""On a CUDA device: a LoRA step beside peft, experts beside transformers, and what is served beside eager and compiled modules.

    python -m benchmarks.cuda step|experts|serve|onnx [--rounds 20]

Arms take turns in one process; each is waited for; the median counts. Memory is the most that torch had given out during an arm's own rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import interleaved, table

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {"model_type": "bert", "architectures": ["BertModel"]}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
Arms = dict[str, Callable[[], Any]]


def compiled(config: dict[str, Any], statements: str, folder: Path) -> Path:
    """What ``statements`` write, in ``folder``, for a model of seeded random weights."""
    import surgery

    place = folder / "config"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    surgery.compile(f"surg 1\n{statements}\n", f"config:{place}", out=folder, force=True)
    return folder


def live(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = AutoModelForCausalLM if config["architectures"][0].endswith("CausalLM") else AutoModel
    with torch.device("cuda"):
        made: nn.Module = kind.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return made


def tokens(batch: int, length: int, vocabulary: int = 30000) -> torch.Tensor:
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).cuda()


def waited(run: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        run()
        torch.cuda.synchronize()

    return call


def timed(arms: Arms, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds and MiB above what stood before, of each arm."""
    peak = {}
    for name, run in arms.items():
        waited(run)()
        waited(run)()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        waited(run)()
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return interleaved({n: waited(run) for n, run in arms.items()}, rounds), peak


def told(what: str, arms: Arms, against: str, rounds: int) -> list[tuple[str, ...]]:
    ms, mib = timed(arms, rounds)
    return [(what, n, f"{ms[n]:.2f}", f"{ms[n] / ms[against]:.3f}", f"{mib[n]:.0f}", f"{mib[n] / mib[against]:.3f}") for n in arms]


class Step:
    """Forward, backward and AdamW on what trains."""

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def __call__(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step(folder: Path, rounds: int) -> list[tuple[str, ...]]:
    """A LoRA of rank 16 on the four projections of attention, in bfloat16."""
    from peft import LoraConfig, get_peft_model

    import surgery

    compiled(
        LLAMA,
        f"adapt lora(rank = 16, alpha = 32, dropout = 0%) on layers[*].attn.{{q, k, v, o}}\nemit torch to {json.dumps('out')}",
        folder,
    )

    def ours() -> nn.Module:
        return surgery.load(folder / "out").to(torch.bfloat16).cuda().train()

    def theirs() -> nn.Module:
        return (
            get_peft_model(live(LLAMA, torch.bfloat16), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).to(torch.bfloat16).train()
        )

    rows = []
    for batch, length in ((4, 512), (8, 1024)):
        ids = tokens(batch, length)
        arms: Arms = {"ours": Step(ours(), ids), "peft": Step(theirs(), ids)}
        if batch > 4:  # compiling takes a minute
            arms |= {f"{n}, compiled": Step(torch.compile(made()), ids) for n, made in (("ours", ours), ("peft", theirs))}  # type: ignore[arg-type]
        rows += told(f"LoRA step ({batch}, {length})", arms, "peft", rounds)
        del arms
        torch._dynamo.reset()
    return rows


def experts(folder: Path, rounds: int) -> list[tuple[str, ...]]:
    """A Mixtral-shaped model in bfloat16: one pass, and one training step of everything."""
    import surgery

    compiled(MIXTRAL, 'emit torch to "out"', folder)
    ours, theirs = surgery.load(folder / "out").to(torch.bfloat16).cuda(), live(MIXTRAL, torch.bfloat16)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    rows = []
    for batch, length in ((1, 128), (4, 512)):
        ids = tokens(batch, length)

        def once(model: nn.Module, ids: torch.Tensor = ids) -> Callable[[], Any]:
            def run() -> Any:
                with torch.no_grad():
                    return model(input_ids=ids, use_cache=False).logits

            return run

        ours.eval(), theirs.eval()
        if len(rows) == 0:
            a, b = once(ours)(), once(theirs)()
            print(f"experts: mean difference of logits {float((a - b).abs().float().mean() / b.abs().float().mean()):.2e}")
        rows += told(f"experts, a pass ({batch}, {length})", {"ours": once(ours), "transformers": once(theirs)}, "transformers", rounds)
        for model in (ours, theirs):
            model.train().requires_grad_(True)
        rows += told(
            f"experts, a step ({batch}, {length})", {"ours": Step(ours, ids), "transformers": Step(theirs, ids)}, "transformers", rounds
        )
    return rows


def serve(folder: Path, rounds: int) -> list[tuple[str, ...]]:
    """BERT-base in half precision: the package beside the live model, eager and compiled."""
    compiled(BERT, 'emit pt2(target = cuda, precision = fp16) to "model.pt2"', folder)
    package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    model = live(BERT, torch.float16).eval()
    quick = torch.compile(live(BERT, torch.float16).eval(), dynamic=True)
    rows = []
    for batch, length in ((1, 16), (1, 128), (32, 128)):
        given = {"input_ids": tokens(batch, length)}
        given |= {"attention_mask": torch.ones_like(given["input_ids"]), "token_type_ids": torch.zeros_like(given["input_ids"])}

        def by(call: Callable[..., Any], given: dict[str, torch.Tensor] = given) -> Callable[[], Any]:
            def run() -> Any:
                with torch.no_grad():
                    return call(**given)

            return run

        rows += told(
            f"BERT-base, fp16 ({batch}, {length})", {"pt2": by(package), "eager": by(model), "compiled": by(quick)}, "compiled", rounds
        )
    return rows


def onnx(folder: Path, rounds: int) -> list[tuple[str, ...]]:
    """BERT-base in half precision under onnxruntime's CUDA provider: fused, and as the exporter wrote it. Inputs and outputs stay on the device."""
    import onnxruntime as ort

    lines = [
        f'emit onnx(target = cuda, precision = fp16{more}) to "{n}.onnx"' for n, more in (("fused", ""), ("plain", ", optimize = none"))
    ]
    compiled(BERT, "\n".join(lines), folder)
    sessions = {n: ort.InferenceSession(str(folder / f"{n}.onnx"), providers=["CUDAExecutionProvider"]) for n in ("fused", "plain")}
    model = live(BERT, torch.float16).eval()
    rows = []
    for batch, length in ((1, 16), (1, 128), (32, 128)):
        ids = tokens(batch, length)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

        def by(session: Any, given: dict[str, torch.Tensor] = given) -> Callable[[], Any]:
            bound = session.io_binding()
            for i in session.get_inputs():
                bound.bind_ortvalue_input(i.name, ort.OrtValue.ortvalue_from_numpy(given[i.name].cpu().numpy(), "cuda", 0))
            for o in session.get_outputs():
                bound.bind_output(o.name, "cuda")
            return lambda: session.run_with_iobinding(bound)

        def eager(given: dict[str, torch.Tensor] = given) -> Any:
            with torch.no_grad():
                return model(**given)

        arms: Arms = {n: by(s) for n, s in sessions.items()} | {"eager": eager}
        ms, _ = timed(arms, rounds)
        rows += [(f"BERT-base, fp16 ({batch}, {length})", n, f"{ms[n]:.2f}", f"{ms[n] / ms['plain']:.3f}", "", "") for n in arms]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", choices=["step", "experts", "serve", "onnx"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    rows: list[tuple[str, ...]] = [("what", "arm", "ms", "ratio", "MiB", "ratio")]
    for what in args.what:
        with tempfile.TemporaryDirectory() as name:
            rows += {"step": step, "experts": experts, "serve": serve, "onnx": onnx}[what](Path(name), args.rounds)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {args.rounds} rounds")
    print(table(rows))


if __name__ == "__main__":
    main()
