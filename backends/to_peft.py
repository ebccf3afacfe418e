"""The peft backend: an adapter folder that ``PeftModel.from_pretrained`` puts onto the base model, with equal outputs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.backends import peft_both, peft_experts, peft_tokens, streaming
from surgery.backends.peft_check import certify
from surgery.backends.peft_parts import START, Said, factors
from surgery.backends.peft_tokens import Tokens
from surgery.backends.protocol import EXPORT_RECORD, EmitRequest, Emitted, owns
from surgery.core.plan import plural
from surgery.core.source import Span, portable
from surgery.model.adapter import CONFIG, TENSORS
from surgery.model.adapter_keys import PREFIX, factor_keys, magnitude_key
from surgery.model.atomic import AtomicOutput, storage_errors
from surgery.model.program import Program
from surgery.model.shards import write_safetensors

NO_MODULE = "dummy-target-modules"
"""The word by which peft lets a LoRA have no layer at all: only what trains whole is in the folder."""

TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "MTModel": "SEQ_2_SEQ_LM"}


class PeftBackend:
    """Writes config and tensors, and proves that what peft loads computes what the program computes."""

    name = "peft"
    folds = False

    def plan(self, program: Program, params: Mapping[str, Any], live: frozenset[str], span: Span | None = None) -> Iterable[str]:
        """What the folder will hold. Raises S0792 and S0793."""
        tokens, said = peft_both.held(program, params, span)
        if tokens is not None:
            if said is not None:
                yield peft_both.HOW
            yield tokens.text()
            yield from tokens.notes(program)
        if said is not None:
            yield from _told(said)

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``dtype``, ``rank``. Raises what :meth:`plan` does, S0794 (peft computes something else), S0801 to S0805 (storage, target)."""
        tokens, said = peft_both.held(program, request.params, request.span)
        dtype = streaming.DTYPES[str(request.params.get("dtype") or "")]
        notes: list[str] = []
        with AtomicOutput(request.target, force=request.force, own=lambda path: owns(path, request.spec_digest)) as folder:
            _put(program, tokens, said, folder, request, dtype)
            if tokens is not None and said is not None:
                notes.append(peft_both.HOW)
            found: list[dict[str, Any]] = []
            if dtype:
                notes.append(f"not compared with peft: the tensors are rounded to {dtype}")
            elif importlib.util.find_spec("peft") is None:
                notes.append("not compared with peft, which is not installed")
            else:
                found, why = _certified(program, tokens, said, folder, request)
                notes += [why] if why else []
            record = {
                "schema": "surgery.export/1", "owner": request.spec_digest, "spec": request.spec.text if request.spec else "",
                "base": _base(program), "certificates": [*request.certificates, *found],
            }  # fmt: skip
            with storage_errors(folder):
                (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
            written = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return Emitted((request.target, *(request.target / n for n in written)), tuple(found), tuple(notes))


def _told(said: Said) -> Iterable[str]:
    """Lines of the plan about changes of weights."""
    ranks = sorted({said.rank(p) for p in said.parts})
    shown = "" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if said.parts:
        yield f"factors of {shown} for {plural(len(said.parts), 'layer')}"
    if said.experts:
        yield f"factors of rank {peft_experts.rank_of(said.experts)} for {plural(len(said.experts), 'tensor')} of experts"
        if any(float(getattr(e.method, "dropout", 0.0)) for g in (*said.experts.values(), *said.parts.values()) for e in g):
            yield "dropout is 0 in the folder: peft has none where an adapter stands on experts"
    if said.whole or said.biases:
        kinds = [plural(len(said.whole), "module") + " whole"] if said.whole else []
        yield " and ".join([*kinds, *([plural(len(said.biases), "bias").replace("biass", "biases")] if said.biases else [])])
    if said.truncated:
        names = list(dict.fromkeys(e.attachment.method.name for e in said.truncated))
        yield f"the changes of {', '.join(names)} are factored by their singular vectors; compile refuses a rank that is too small"


def _put(program: Program, tokens: Tokens | None, said: Said | None, folder: Path, request: EmitRequest, dtype: str = "") -> None:
    """Writes what there is: one adapter into the folder, or two into folders of their own in it."""
    low, front = peft_both.places(folder) if tokens is not None and said is not None else (folder, folder)
    if said is not None:
        _write(program, said, low, request, dtype)
    if tokens is not None:
        _files(front, *peft_tokens.folder_of(program, tokens, request, _base(program)["ref"]), dtype)
    if tokens is not None and said is not None:
        peft_both.note_base(folder, _base(program))


def _certified(
    program: Program, tokens: Tokens | None, said: Said | None, folder: Path, request: EmitRequest
) -> tuple[list[dict[str, Any]], str]:
    if tokens is None:
        assert said is not None
        return certify(program, said, folder, request, _write)
    if said is None:
        return peft_tokens.certify(program, tokens, folder, request)
    return peft_both.certify(program, tokens, said, folder, request, _put)


def _base(program: Program) -> dict[str, str]:
    """The model that the adapter belongs to: the first one, where the program was read from an artifact of it."""
    return dict(program.past.model) or {"ref": portable(program.info.ref), "hash": program.info.hash}


# ------------------------------------------------------------------ tensors and config


def _write(program: Program, said: Said, folder: Path, request: EmitRequest, dtype: str = "") -> None:
    """Both files of an adapter folder. The bytes depend on the program and the dtype alone."""
    _files(folder, *_folder(program, said, request), dtype)


def _files(folder: Path, made: Mapping[str, Tensor], config: Mapping[str, Any], dtype: str) -> None:
    tensors = {
        k: t.detach().to(getattr(torch, dtype) if dtype and t.is_floating_point() else t.dtype).contiguous() for k, t in made.items()
    }
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    dtypes = {k: str(t.dtype).removeprefix("torch.") for k, t in tensors.items()}
    write_safetensors(folder / TENSORS, tensors, shapes, dtypes)
    with storage_errors(folder):
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _folder(program: Program, said: Said, request: EmitRequest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, entries in said.parts.items():
        made = [factors(e, program, request.tensors) for e in entries]
        embedding = entries[0].site.op == "embedding"
        first, second = factor_keys(path, embedding)
        if said.native:
            (a, b, _, magnitude), alpha = made[0], float(entries[0].method.alpha)
            if magnitude is not None:
                shape = (1, -1, *(1,) * len(entries[0].site.kernel)) if entries[0].site.op == "conv" else (-1,)
                tensors[magnitude_key(path)] = magnitude.reshape(shape)
        else:
            scale = made[0][2] if len(made) == 1 else 1.0
            a = torch.cat([t[0] * (t[2] / scale) for t in made])
            b = torch.cat([t[1] for t in made], dim=1)
            alpha = scale * a.shape[0]
        tensors[first], tensors[second] = a, b
        ranks[path], alphas[path] = int(a.shape[0]), alpha
    common = peft_experts.rank_of(said.experts)
    for name, key in peft_experts.keys_of(program, list(said.experts)).items():
        a, b = peft_experts.factors_of(program, name, said.experts[name], common, request.tensors)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    for names in said.whole.values():
        for name in names:
            tensors[f"{PREFIX}{name}"] = request.tensors.of(program, name)
    for name in said.biases:
        path = name.rpartition(".")[0]
        tensors[f"{PREFIX}{path}.base_layer.bias" if path in said.parts else f"{PREFIX}{name}"] = request.tensors.of(program, name)
    return tensors, _config(program, said, ranks, alphas)


def _config(program: Program, said: Said, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8.0)
    if said.experts:
        rank = peft_experts.rank_of(said.experts)
        alpha = float(rank)
    entries = [e for group in said.parts.values() for e in group]
    dropouts = [float(getattr(e.method, "dropout", 0.0)) for e in entries]
    architecture = program.info.architecture
    return {
        "peft_type": "LORA", "task_type": next((t for end, t in TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": _base(program)["ref"], "inference_mode": True, "auto_mapping": None, "revision": None,
        "r": rank, "lora_alpha": _number(alpha),
        "rank_pattern": {_pattern(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(p): _number(a) for p, a in alphas.items() if a != alpha},
        "target_modules": targets(program, list(said.parts)) if said.parts else [] if said.experts else NO_MODULE,
        "target_parameters": list(said.experts) or None,
        "lora_dropout": 0.0 if said.experts else max(dropouts, default=0.0), "fan_in_fan_out": any(e.site.op == "linear" and e.site.transposed for e in entries),
        "bias": "all" if said.biases else "none", "modules_to_save": sorted(said.whole) or None,
        "use_rslora": bool(said.flags.get("use_rslora")), "use_dora": bool(said.flags.get("use_dora")),
        START: said.flags.get(START, True),
    }  # fmt: skip


def _commonest(values: Iterable[Any], default: Any) -> Any:
    given = list(values)
    return max(dict.fromkeys(given), key=given.count) if given else default


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() and math.isfinite(value) else value


def _pattern(path: str) -> str:
    """A pattern that matches this path and no other."""
    return f"^{re.escape(path)}"


def targets(program: Program, paths: list[str]) -> list[str] | str:
    """How the config names the layers: by their last words where those name no other layer, else by whole paths; as a pattern where the end of
    another path looks like one of them."""
    layers = [
        p for p, m in program.graph.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or p in paths or type(m).__name__ == "Conv1D"
    ]  # fmt: skip
    wanted = set(paths)
    words = {p.rpartition(".")[2] for p in paths}
    if all(p in wanted for p in layers if p.rpartition(".")[2] in words):
        modules = {p for p, _ in program.graph.named_modules(remove_duplicate=False)}
        if all(p in wanted for p in modules if p.rpartition(".")[2] in words):
            return sorted(words)
    if any(other != p and other.endswith(f".{p}") for p in paths for other in layers):
        return "|".join(f"({re.escape(p)})" for p in paths)
    return list(paths)


BACKEND = PeftBackend()

__all__ = ["BACKEND", "PeftBackend", "targets"]
