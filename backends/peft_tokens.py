"""Adapter folders of virtual tokens: embeddings that peft puts in front (prompt tuning), or keys and values that its cache starts with (prefix tuning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.backends import peft_check, peft_prefix
from surgery.backends.peft_parts import CHANGES_BASE, Said, changed, trained
from surgery.backends.peft_prefix import cannot
from surgery.backends.protocol import EmitRequest
from surgery.core.diagnostics import fail
from surgery.core.plan import plural
from surgery.core.source import Span
from surgery.model import pytree
from surgery.model.adapter_tokens import KEY
from surgery.model.live import live_root
from surgery.model.program import Attachment, Program
from surgery.model.running import is_small
from surgery.model.sample import placeholders, sample_inputs

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that peft keeps beside virtual tokens, by task."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip

KEEPS_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks in which peft hands on token types beside virtual tokens."""

UNTYPED = "peft gives the model no token types beside virtual tokens for this task: all are 0 there"


@dataclass(frozen=True)
class Tokens:
    """What such a folder holds: the attachment, how many tokens it has, and modules of the base that train whole. Keys and values that stand at
    attentions are the ``prefix``, whose keys are turned by ``turn`` positions."""

    attachment: Attachment
    module: Any
    count: int
    task: str
    whole: Mapping[str, list[str]] = field(default_factory=dict)
    prefix: tuple[Attachment, ...] = ()
    turn: int = 0

    @property
    def stored(self) -> tuple[tuple[int, int, int], ...]:
        return () if self.prefix else tuple(self.module.stored)

    def text(self) -> str:
        what = "keys and values" if self.stored or self.prefix else "embeddings"
        more = f", and {plural(len(self.whole), 'module')} whole" if self.whole else ""
        return f"{what} of {plural(self.count, 'virtual token')}{more}"


def tokens_of(program: Program, span: Span | None) -> Tokens | None:
    """The virtual tokens of a program, None where it has none. Raises S0792 (the base was changed) and S0793 (something beside them that such a
    folder does not hold)."""
    a = next((a for a in program.attachments if a.method.stands == "tokens"), None)
    if a is None:
        if not any(b.method.stands == "attention" for b in program.attachments):
            return None
        found, turn = peft_prefix.prefix_of(program, span)
        module: Any = program.module(found[0].module)
        task = next((t for end, t in TASKS.items() if program.info.architecture.endswith(end)), "FEATURE_EXTRACTION")
        return Tokens(found[0], module, module.method.entries(), task, _heads(program, task, span), found, turn)
    if not a.tensors:
        why = "keys and values of a decoder stand in peft's cache twice, for every second layer's of the file"
        raise cannot(a, why, span, "the folder that they came from is one; `emit torch` keeps what was trained since")
    own = {a.module, *a.tensors}
    for key, origins in program.journal.entries.items():
        if key in own or key.startswith("::"):
            continue
        other = next((o for o in origins if o.verb in CHANGES_BASE and o != a.origin), None)
        if other is not None:
            raise changed(other, span)
    beside = next((b for b in program.attachments if b is not a), None)
    if beside is not None:
        raise cannot(a, f"{beside.name} on {beside.site.role} is of another kind, and a folder holds one", span, "emit them from two specs")
    module = program.module(a.module)
    if module.stored and len(set(module.stored)) > 1:
        raise cannot(a, "its keys and values differ in size between layers, and such a folder has one size", span)
    if not module.stored and not getattr(a.method, "exchange", False):
        raise cannot(a, f"{a.method.name} makes its embeddings from other tensors; fold it first where that stores keys and values", span)
    task = next((t for end, t in TASKS.items() if program.info.architecture.endswith(end)), "FEATURE_EXTRACTION")
    return Tokens(a, module, module.method.entries(), task, _heads(program, task, span))


def _heads(program: Program, task: str, span: Span | None) -> dict[str, list[str]]:
    """The modules that peft keeps whole beside virtual tokens."""
    said = Said()
    trained(program, said, span)
    heads = HEADS.get(task, ())
    stray = next((p for p in (*said.whole, *said.biases) if p.rpartition(".")[2] not in heads), None)
    if stray is not None:
        raise fail(
            "S0793", f"`{stray}` trains whole, and peft keeps no such module beside virtual tokens", span, "asked for here",
            help="freeze it, or `emit torch`, which keeps what trains",
        )  # fmt: skip
    whole = dict(said.whole)
    for path, child in program.graph.named_children():  # peft looks for its head in the folder, trained or not
        if path in heads and path not in whole:
            whole[path] = [f"{path}.{n}" for n, _ in child.named_parameters()]
    return whole


def folder_of(program: Program, tokens: Tokens, request: EmitRequest, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key and the config."""
    a = tokens.attachment
    t = {n.rpartition(".")[2]: request.tensors.of(program, n) for n in a.tensors}
    config: dict[str, Any] = {
        "task_type": tokens.task, "base_model_name_or_path": base, "inference_mode": True, "auto_mapping": None, "revision": None,
        "num_virtual_tokens": tokens.count, "num_transformer_submodules": 1, "modules_to_save": sorted({p.rpartition(".")[2] for p in tokens.whole}) or None,
    }  # fmt: skip
    if tokens.prefix:
        core = tokens.module.site
        made = peft_prefix.tables_of(program, tokens.prefix, tokens.turn, request.tensors)
        config |= {
            "peft_type": "PREFIX_TUNING", "num_layers": len(tokens.prefix), "num_attention_heads": core.heads, "token_dim": core.heads * core.key,
            "encoder_hidden_size": core.heads * core.key, "prefix_projection": False,
        }  # fmt: skip
    elif tokens.stored:
        layers = len(tokens.stored) // 2
        heads, count, width = tokens.stored[0]
        # a past is all keys and then all values, the folder goes layer by layer
        tables = _by_past(program, a)
        parts = [
            t[f"table_{tables[side * layers + i]}"].transpose(0, 1).reshape(count, heads * width) for i in range(layers) for side in (0, 1)
        ]
        made = torch.cat(parts, 1)
        config |= {
            "peft_type": "PREFIX_TUNING", "num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width,
            "encoder_hidden_size": heads * width, "prefix_projection": False,
        }  # fmt: skip
    else:
        made = tokens.module.method.embeddings(t)
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": int(made.shape[1]), "prompt_tuning_init": "RANDOM"}
    tensors = {KEY: made.contiguous()}
    for names in tokens.whole.values():
        tensors |= {f"base_model.{name}": request.tensors.of(program, name) for name in names}
    return tensors, config


def _by_past(program: Program, a: Attachment) -> list[int]:
    """Which table stands in front of each part of the past, in the order of the inputs."""
    found = {n.args[0]: n.args[2] for n in program.graph.graph.find_nodes(op="call_module", target=a.module) if len(n.args) == 3}
    return [int(found[n]) for n in program.graph.graph.find_nodes(op="placeholder") if n in found]  # type: ignore[arg-type]


def certify(program: Program, tokens: Tokens, folder: Path, request: EmitRequest) -> tuple[list[dict[str, Any]], str]:
    """The certificate, or why there is none. Raises S0794 where what peft loads computes something else."""
    if not is_small(program):
        return [], "not compared with peft: running two copies of the model takes more memory than writing did"
    model = peft_check.base_model(request.base or program, request.tensors)
    if model is None:
        return [], "not compared with peft: there is no transformers model that the base is"
    worst, scale = _difference(program, tokens, peft_check.loaded(model, folder), request)
    tolerance = peft_check.TOLERANCE * scale
    if worst > tolerance:
        raise fail(
            "S0794", f"what peft loads computes something else: the outputs differ by {worst:.3g}, allowed {tolerance:.3g}", request.span, "asked for here",
            help="nothing was written; please report this with the spec and the model's config", exit_code=2,
        )  # fmt: skip
    untyped = tokens.task not in KEEPS_TYPES and any("token_type" in name for name, _ in placeholders(program))
    return [
        {"claim": "peft = program", "max_abs_error": worst, "tolerance": tolerance, "ok": True, "samples": [c[0] for c in peft_check.CASES]}
    ], UNTYPED if untyped else ""


def _cached(tree: Mapping[str, Any]) -> list[bool]:
    """For every output whether it is a part of a cache: peft's has the virtual tokens, as far as its windows go."""
    if tree["type"] == "cache":
        return [True] * pytree.leaves_in(dict(tree))
    return [False] if tree["type"] == "tensor" else [c for item in tree.get("items", ()) for c in _cached(item)]


def _difference(program: Program, tokens: Tokens, model: Any, request: EmitRequest) -> tuple[float, float]:
    """The largest difference of any floating output at the real tokens, and the largest value there (at least 1). peft's outputs have rows of the virtual
    tokens in front, which are left out."""
    root = live_root(program, request.tensors, dtype=torch.float32).eval()
    signature = program.signature
    worst, scale = 0.0, 1.0
    for _, batch, length, padding in peft_check.CASES:
        inputs = sample_inputs(program, batch=batch, length=length, seed=11, padding=padding)
        names = [name for name, _ in placeholders(program)]
        if tokens.task not in KEEPS_TYPES:
            inputs = [torch.zeros_like(x) if "token_type" in n else x for n, x in zip(names, inputs, strict=True)]
        mask = next((x for n, x in zip(names, inputs, strict=True) if n == "attention_mask"), None)
        want, got = peft_check.both(root, model, signature, inputs)
        for x, y, cached in zip(want, got, _cached(signature.out_spec), strict=True):
            if cached or not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
                continue
            for axis in range(min(x.dim(), y.dim())):
                if y.shape[axis] == x.shape[axis] + tokens.count:
                    y = y.narrow(axis, tokens.count, x.shape[axis])
            if x.shape != y.shape:
                return float("inf"), scale
            if mask is not None and x.dim() > 1 and x.shape[:2] == mask.shape:
                x, y = x[mask.bool()], y[mask.bool()]
            worst, scale = max(worst, float((x.double() - y.double()).abs().max())), max(scale, float(x.abs().max()))
    return worst, scale
