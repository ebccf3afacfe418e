"""Whether checkpoints fit each other: tensors, shapes, vocabularies, ties and types, known before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.core.diagnostics import Sink
from surgery.core.plan import plural
from surgery.model.program import Program
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.operation import Resolved

MEANT_OTHERWISE = frozenset(
    "architectures model_type name_or_path _name_or_path dtype torch_dtype transformers_version use_cache tie_word_embeddings vocab_size num_hidden_layers "
    "initializer_range initializer_factor id2label label2id num_labels problem_type task_specific_params finetuning_task pretraining_tp auto_map "
    "gradient_checkpointing output_attentions output_hidden_states return_dict router_aux_loss_coef output_router_logits _attn_implementation".split()
)
"""Entries of a config that do not say how its weights are used, or of which something else speaks."""


def unlike(program: Program, source: Source) -> dict[str, tuple[Any, Any]]:
    """Entries that the configs of the model and of a source both have and that say something else about what is computed: (here, there)."""
    if source.program is None:
        return {}
    mine, theirs = program.info.config, source.program.info.config
    return {
        key: (mine[key], theirs[key])
        for key in sorted(set(mine) & set(theirs) - MEANT_OTHERWISE)
        if mine[key] != theirs[key] and not key.endswith(("_token_id", "dropout", "dropout_prob", "drop_rate", "_droprate", "layerdrop"))
    }


def compatible(program: Program, names: Sequence[str], sources: Sequence[Source], op: Resolved, common: bool) -> dict[str, int]:
    """Every source has every tensor in the program's shape, and ties what the program ties.

    With ``common`` tensors that have a row for each word may be of different vocabularies: their names with the number of rows that all
    have. Raises S0774 (shapes), S0778 (vocabularies), S0796 (ties), S0797 (tensors that the source or the model lacks), all findings at once.
    """
    sink = Sink()
    rows: dict[str, int] = {}
    for source in sources:
        if source.own:
            continue
        span = source.span if source.span.end else op.origin.span
        missing = [n for n in names if source.aliases.get(n, n) not in source.weights]
        left = [] if missing or op.sites else _left_over(program, source)
        if missing or left:
            name, *others = missing or left
            lacks = f"{source.name} has no `{name}`" if missing else f"the model has no `{name}` of {source.name}"
            sink.error(
                "S0797", lacks + (f" and {plural(len(others), 'tensor')} more" if others else ""), span, "merged here",
                notes=_depths(program, source),
                help="merge checkpoints of one architecture and depth, before the lines that change the structure; or merge the parts that both have, with `on`",
            )  # fmt: skip
            continue
        shapes = [(n, source.weights[source.aliases.get(n, n)].shape, program.weights[n].shape) for n in names]
        wrong = [s for s in shapes if s[1] != s[2]]
        words = [s for s in wrong if _is_vocabulary(program, source, s[1], s[2])]
        if common:
            for name, theirs, ours in words:
                rows[name] = min(rows.get(name, ours[0]), theirs[0], ours[0])
        elif words and len(words) == len(wrong):
            name, theirs, ours = words[0]
            sink.error(
                "S0778", f"{source.name} has {theirs[0]:,} words and the model {ours[0]:,}: `{name}` is {list(theirs)} there and {list(ours)} here",
                span, "merged here",
                help=["merge checkpoints of one tokenizer", "`vocab = common` merges the words that all have, by number, and leaves the model's others as they are"],
            )  # fmt: skip
            continue
        wrong = [s for s in wrong if s[0] not in rows]
        if wrong:
            name, theirs, ours = wrong[0]
            more = f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
            sink.error(
                "S0774", f"`{name}` is {list(theirs)} in {source.name} and {list(ours)} here{more}", span, "merged here",
                help="merge checkpoints of one shape, before the lines that change the structure",
            )  # fmt: skip
            continue
        _ties(program, names, source, span, sink)
    sink.raise_if_failed()
    for source in (s for s in sources if not s.own):
        for name, first in source.aliases.items():
            if name in names and first in program.weights and name not in program.aliases:
                op.tell(f"{source.name} ties `{name}` to `{first}`, the model does not: its one tensor is merged into both")
    for source in sources:
        if other := unlike(program, source):
            listed = ", ".join(f"`{k}` is {shown(there)} there and {shown(here)} here" for k, (here, there) in other.items())
            op.tell(f"the config of {source.name} says something else about the same weights: {listed}; the model's stays")
    for name, count in rows.items():
        op.tell(f"{name}: the first {count:,} of {program.weights[name].shape[0]:,} rows are merged, the others stay the model's")
    return rows


def shown(value: Any) -> str:
    """An entry of a config on one line."""
    return json.dumps(value, sort_keys=True, default=str)


def _ties(program: Program, names: Sequence[str], source: Source, span: Any, sink: Sink) -> None:
    """What is one tensor here must not be two there."""
    for alias, first in program.aliases.items():
        if first not in names:
            continue
        theirs = source.weights.get(source.aliases.get(alias, alias))
        if theirs is not None and theirs.identity != source.weights[source.aliases.get(first, first)].identity:
            sink.error(
                "S0796", f"`{alias}` and `{first}` are one tensor here and two in {source.name}", span, "merged here",
                help="untie the model (`tie_word_embeddings` of its config, with both tensors stored), or tie the checkpoint",
            )  # fmt: skip
            return


def _left_over(program: Program, source: Source) -> list[str]:
    """The parameters of a source that a merge of whole models would lose."""
    if source.program is None:
        return []
    parameters = [n for n, _ in source.program.graph.named_parameters(remove_duplicate=False)]
    return [n for n in parameters if program.aliases.get(n, n) not in program.weights]


def _depths(program: Program, source: Source) -> list[str]:
    other = source.program
    if other is None:
        return []
    mine = {s.name: s.layers for s in program.anatomy.stacks}
    return [
        f"`{s.name}` has {plural(s.layers, 'layer')} in {source.name} and {mine[s.name]} here" for s in other.anatomy.stacks if mine.get(s.name, s.layers) != s.layers
    ]  # fmt: skip


def _is_vocabulary(program: Program, source: Source, theirs: Sequence[int], ours: Sequence[int]) -> bool:
    """Whether two shapes differ in the number of words alone."""
    if source.program is None or len(theirs) != len(ours) or not ours or tuple(theirs[1:]) != tuple(ours[1:]):
        return False
    return theirs[0] == _words(source.program) and ours[0] == _words(program)


def _words(program: Program) -> int | None:
    config = program.info.config
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("vocab_size")
    return found if isinstance(found, int) else None


def mixed(program: Program, operands: Mapping[str, Operands], sources: Sequence[Source]) -> list[str]:
    """What is said of checkpoints of other types than the model's: every tensor is computed in float32 and rounded once."""
    other: dict[str, dict[str, int]] = {}
    for o in operands.values():
        for source, expr in zip(sources, o.experts, strict=True):
            if expr.dtype != o.base.dtype:
                counts = other.setdefault(source.name, {})
                counts[expr.dtype] = counts.get(expr.dtype, 0) + 1
    if not other:
        return []
    kinds = sorted({o.base.dtype for o in operands.values()})
    parts = []
    for name, counts in other.items():
        parts.append(f"{name} has " + ", ".join(f"{plural(n, 'tensor')} of {kind}" for kind, n in sorted(counts.items())))
    return [f"types differ: {'; '.join(parts)}; computed in float32, stored as {', '.join(kinds)} like the model"]
