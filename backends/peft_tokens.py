"""Adapter folders of virtual tokens: embeddings that peft puts in front (prompt tuning), or keys and values that its cache starts with (prefix tuning)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.backends import peft_check, peft_prefix
from surgery.backends.peft_parts import Said, trained
from surgery.backends.peft_prefix import Prefix, cannot
from surgery.backends.protocol import EmitRequest
from surgery.core.diagnostics import fail
from surgery.core.plan import plural
from surgery.core.source import Span
from surgery.model import pytree, running
from surgery.model.adapter_tokens import KEY, TASK_FACTORS
from surgery.model.live import live_root
from surgery.model.program import Attachment, Program
from surgery.model.running import is_small
from surgery.model.sample import placeholders, sample_inputs

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that peft keeps beside virtual tokens, by task."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "MTModel": "SEQ_2_SEQ_LM",
}  # fmt: skip

KEEPS_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks in which peft hands on token types beside virtual tokens."""

BOTH = (
    "the folder is one of prompt tuning of several tasks with task 0 alone (`task_ids`), the kind that peft puts in front of a decoder, too; "
    "its `generate` leaves the decoder's tokens out"
)
SPARE = 2
"""Rows of a table of positions that families keep for padding."""

UNTYPED = "peft gives the model no token types beside virtual tokens for this task: all are 0 there"


@dataclass(frozen=True)
class Tokens:
    """What such a folder holds: the attachment, how many tokens it has, and modules of the base that are kept whole. Keys and values that stand at
    attentions are the ``prefix``. ``own`` are the attachments that all of this is, of which ``second`` are embeddings in front of a decoder."""

    attachment: Attachment
    module: Any
    count: int
    task: str
    own: tuple[Attachment, ...]
    whole: Mapping[str, list[str]] = field(default_factory=dict)
    prefix: Prefix | None = None
    second: Attachment | None = None

    @property
    def stored(self) -> tuple[tuple[int, int, int], ...]:
        return () if self.prefix else tuple(self.module.stored)

    @property
    def pair(self) -> bool:
        """Whether the folder is one for an encoder and its decoder."""
        return self.second is not None or (self.prefix is not None and self.prefix.pair)

    def text(self) -> str:
        what = "keys and values" if self.stored or self.prefix else "embeddings"
        more = f", and {plural(len(self.whole), 'module')} whole" if self.whole else ""
        return f"{what} of {plural(self.count, 'virtual token')}{more}"

    def notes(self, program: Program) -> list[str]:
        """What a reader of the plan should know of it."""
        if self.second is not None:
            return [BOTH]
        if self.prefix is None or not self.prefix.rows:
            return []
        rows = program.weights[self.prefix.positions].shape[0]
        return [
            f"`{self.prefix.positions}` goes along, {self.count} rows further down, because peft's cache moves positions; with peft "
            f"the last {self.count} of {rows} positions cannot be used"
        ]


def tokens_of(program: Program, span: Span | None) -> Tokens | None:
    """The virtual tokens of a program, None where it has none; other attachments are another folder's affair.

    Raises S0792 (the base was changed) and S0793 (what such a folder cannot hold).
    """
    a = next((a for a in program.attachments if a.method.stands == "tokens"), None)
    task = next((t for end, t in TASKS.items() if program.info.architecture.endswith(end)), "FEATURE_EXTRACTION")
    if any(b.method.stands == "attention" for b in program.attachments):
        if a is not None and a.tensors:
            raise cannot(a, "there are keys and values in front of attentions, too, and a folder holds one of the two", span)
        prefix = peft_prefix.prefix_of(program, span)
        _runs(program, prefix.parts[0], True, prefix.pair, task, span)
        own = (*prefix.parts, *((a,) if a is not None else ()))
        module: Any = program.module(prefix.parts[0].module)
        whole = _heads(program, task, span)
        table = prefix.positions
        if table:
            whole[table.rpartition(".")[0]] = [table]
        return Tokens(prefix.parts[0], module, module.method.entries(), task, own, whole, prefix)
    if a is None:
        return None
    second = next((b for b in program.attachments if b.method.stands == "tokens" and b is not a), None)
    own = (a,) if second is None else (a, second)
    crossed = any(s.facts.get("cross") for s in program.anatomy.sites if s.is_region)
    _runs(program, a, bool(getattr(program.module(a.module), "stored", ())), crossed, task, span)
    peft_prefix.unchanged(program, own, set(), span)
    module = program.module(a.module)
    if module.stored and len(set(module.stored)) > 1:
        raise cannot(a, "its keys and values differ in size between layers, and such a folder has one size", span)
    if not module.stored and not getattr(a.method, "exchange", False):
        raise cannot(a, f"{a.method.name} makes its embeddings from other tensors; fold it first where that stores keys and values", span)
    return Tokens(a, module, module.method.entries(), task, own, _heads(program, task, span), second=second)


def _runs(program: Program, a: Attachment, cached: bool, pair: bool, task: str, span: Span | None) -> None:
    """Raises S0793 for a model in front of which peft puts no virtual tokens."""
    import transformers

    family = getattr(transformers, program.info.architecture, None) if program.info.architecture else None
    takes = set(inspect.signature(family.forward).parameters) if family is not None else {"input_ids", "past_key_values"}
    why = (
        "peft puts virtual tokens in front of `input_ids`, and the model does not take them" if "input_ids" not in takes
        else "peft hands on keys and values as `past_key_values`, and the model does not take them" if cached and "past_key_values" not in takes and task not in KEEPS_TYPES
        else f"peft runs virtual tokens beside an encoder in models with a language head alone, and this is {program.info.architecture}"
        if pair and task != "SEQ_2_SEQ_LM"
        else ""
    )  # fmt: skip
    if why:
        raise cannot(a, why, span)


def _heads(program: Program, task: str, span: Span | None) -> dict[str, list[str]]:
    """The modules that peft keeps whole beside virtual tokens: those that train, and the head that it looks for in the folder, trained or not."""
    said = Said()
    trained(program, said, span)
    beside = any(a.method.stands not in ("tokens", "attention") for a in program.attachments)  # then there is a folder for biases
    if said.biases and not beside:
        raise fail(
            "S0793", f"`{said.biases[0]}` trains, and beside virtual tokens peft keeps whole modules alone", span, "asked for here",
            help="freeze it, or train the module that it is in as a whole; `emit torch` keeps what trains",
        )  # fmt: skip
    whole = dict(said.whole)
    for path, child in program.graph.named_children():
        if path in HEADS.get(task, ()) and path not in whole:
            whole[path] = [f"{path}.{n}" for n, _ in child.named_parameters()]
    return whole


def saved(program: Program, paths: Sequence[str]) -> list[str]:
    """How a config names modules that are kept whole: peft takes every module whose path ends in such a name, so the last word where that is one
    module's, else the whole path."""
    every = [p for p, _ in program.graph.named_modules(remove_duplicate=False)]
    words = {p: p.rpartition(".")[2] for p in paths}
    return sorted(w if [e for e in every if e.endswith(w)] == [p] else p for p, w in words.items())


def folder_of(program: Program, tokens: Tokens, request: EmitRequest, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key and the config."""
    a = tokens.attachment
    t = {n.rpartition(".")[2]: request.tensors.of(program, n) for n in a.tensors}
    config: dict[str, Any] = {
        "task_type": tokens.task, "base_model_name_or_path": base, "inference_mode": True, "auto_mapping": None, "revision": None,
        "num_virtual_tokens": tokens.count, "num_transformer_submodules": 2 if tokens.pair else 1,
        "modules_to_save": saved(program, list(tokens.whole)) or None,
    }  # fmt: skip
    if tokens.prefix:
        core = tokens.module.site
        made = peft_prefix.tables_of(program, tokens.prefix, request.tensors)
        config |= {
            "peft_type": "PREFIX_TUNING", "num_layers": tokens.prefix.layers, "num_attention_heads": core.heads, "token_dim": core.heads * core.key,
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
    elif tokens.second is not None:
        module: Any = program.module(tokens.second.module)
        more = {n.rpartition(".")[2]: request.tensors.of(program, n) for n in tokens.second.tensors}
        made = torch.cat([tokens.module.method.embeddings(t), module.method.embeddings(more)])
        config |= {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "token_dim": int(made.shape[1]),
            "prompt_tuning_init": "RANDOM",
            "num_tasks": 1,
            "num_ranks": 1,
        }
    else:
        made = tokens.module.method.embeddings(t)
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": int(made.shape[1]), "prompt_tuning_init": "RANDOM"}
    tensors = {KEY: made.contiguous()}
    if tokens.second is not None:  # what the task multiplies them by
        tensors |= {n: torch.ones(1, *size) for n, size in zip(TASK_FACTORS, ((len(made), 1), (1, made.shape[1])), strict=True)}
    for names in tokens.whole.values():
        tensors |= {f"base_model.{name}": request.tensors.of(program, name) for name in names}
    if tokens.prefix and tokens.prefix.rows:
        key = f"base_model.{tokens.prefix.positions}"
        tensors[key] = peft_prefix.moved_table(tensors[key], tokens.prefix.rows)
    return tensors, config


def _by_past(program: Program, a: Attachment) -> list[int]:
    """Which table stands in front of each part of the past, in the order of the inputs."""
    found = {n.args[0]: n.args[2] for n in program.graph.graph.find_nodes(op="call_module", target=a.module) if len(n.args) == 3}
    return [int(found[n]) for n in program.graph.graph.find_nodes(op="placeholder") if n in found]  # type: ignore[arg-type]


def certify(program: Program, tokens: Tokens, folder: Path, request: EmitRequest) -> tuple[list[dict[str, Any]], str]:
    """The certificate, or why there is none. Raises S0794 where what peft loads computes something else."""
    if not is_small(program):
        return [], peft_check.LARGE
    model = peft_check.base_model(request.base or program, request.tensors)
    if model is None:
        return [], peft_check.NO_MODEL
    worst, scale = difference(program, tokens, peft_check.loaded(model, folder), request)
    return peft_check.judged(worst, scale, request), untyped(program, tokens)


def untyped(program: Program, tokens: Tokens) -> str:
    """What is to be said of token types, if anything is."""
    return UNTYPED if tokens.task not in KEEPS_TYPES and any("token_type" in name for name, _ in placeholders(program)) else ""


def _cached(tree: Mapping[str, Any]) -> list[bool]:
    """For every output whether it is a part of a cache: peft's has the virtual tokens, as far as its windows go."""
    if tree["type"] == "cache":
        return [True] * pytree.leaves_in(dict(tree))
    return [False] if tree["type"] == "tensor" else [c for item in tree.get("items", ()) for c in _cached(item)]


def _of_task(model: Any) -> Any:
    """A call of peft's model with prompts on both sides, which takes a decoder's embeddings and a task."""

    def call(**given: Any) -> Any:
        ids = given.pop("decoder_input_ids")
        return model(**given, decoder_inputs_embeds=model.word_embeddings(ids), task_ids=torch.zeros(len(ids), dtype=torch.long))

    return call


def _room(program: Program, tokens: Tokens) -> int:
    """How many tokens a sample may have where peft's cache takes positions from a table that is not long (0: any number)."""
    if tokens.prefix is None or not tokens.prefix.rows:
        return 0
    table = program.weights[tokens.prefix.positions].shape[0]
    return int(max(1, table - tokens.count - SPARE))


def difference(program: Program, tokens: Tokens, model: Any, request: EmitRequest) -> tuple[float, float]:
    """The largest difference of any floating output at the real tokens, and the largest value there (at least 1). peft's outputs have rows of the virtual
    tokens in front, which are left out."""
    root = live_root(program, request.tensors, dtype=torch.float32).eval()
    signature = program.signature
    worst, scale = 0.0, 1.0
    called = model if tokens.second is None else _of_task(model)
    room = _room(program, tokens)
    for _, batch, length, padding in peft_check.CASES:
        length = min(length, room) if room else length
        inputs = sample_inputs(program, batch=batch, length=length, seed=11, padding=padding)
        names = [name for name, _ in placeholders(program)]
        if tokens.task not in KEEPS_TYPES:
            inputs = [torch.zeros_like(x) if "token_type" in n else x for n, x in zip(names, inputs, strict=True)]
        masks = [x for n, x in zip(names, inputs, strict=True) if n.endswith("attention_mask")]
        want, got = peft_check.both(root, called, signature, inputs, request.span)
        for x, y, cached in zip(want, got, _cached(signature.out_spec), strict=True):
            if cached or not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
                continue
            for axis in range(min(x.dim(), y.dim())):
                if y.shape[axis] == x.shape[axis] + tokens.count:
                    y = y.narrow(axis, tokens.count, x.shape[axis])
            if x.shape != y.shape:
                return float("inf"), scale
            real = [m.bool() for m in masks if x.dim() > 1 and x.shape[:2] == m.shape]
            if real:
                seen = torch.stack(real).all(0)
                x, y = x[seen], y[seen]
            error, size = running.difference(x, y)
            worst, scale = max(worst, error), max(scale, size)
    return worst, scale
