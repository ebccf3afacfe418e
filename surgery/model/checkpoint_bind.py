"""From stored tensors to a module's parameters: which expression gives each, and everything that does not fit, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from surgery.core.diagnostics import Severity, Sink, error
from surgery.core.source import Span
from surgery.model.checkpoint import Checkpoint
from surgery.model.checkpoint_config import meta_model
from surgery.model.checkpoint_convert import Converted, convert
from surgery.model.checkpoint_init import initial
from surgery.model.naming import Naming
from surgery.model.weights import Expr, Weights, cast, is_float

Parameters = Mapping[str, tuple[tuple[int, ...], str | None]]


def bind(
    checkpoint: Checkpoint,
    parameters: Parameters,
    aliases: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    given: Mapping[str, Expr] | None = None,
    own_dtype: str | None = None,
    span: Span | None = None,
    naming: Naming | None = None,
) -> Weights:
    """The expression of each parameter and persistent buffer of a module over a checkpoint's tensors.

        ``parameters`` maps state-dict names to (shape, dtype wanted; None keeps what is stored), in state-dict order; ``aliases`` maps
        each further name of a tied tensor to its first name (aliases get no entry). ``model`` is the transformers model on meta
        that the names come from (built from the config when absent). ``given`` are expressions for names that no checkpoint holds
        (buffers computed at construction); they win. ``own_dtype`` is the dtype that stands for the model's own in ``parameters`` (a capture
    writes it as ``bfloat16``): those take the checkpoint's dtype. ``naming`` is what is known of the class's conversions: where none applies, no model is built.

        Raises one SurgeryError with all findings: S0714 missing, S0715 a head that would be random, S0716 unexpected,
        S0717 wrong shape, S0718 wrong kind of dtype, S0719 an inexpressible conversion. Stored tensors of a head that the
        architecture lacks are S0720 notes in ``Weights.notes``.
    """
    aliases = dict(aliases or {})
    given = dict(given or {})
    wanted = {
        name: (tuple(shape), checkpoint.dtype if own_dtype is not None and dtype == own_dtype else dtype)
        for name, (shape, dtype) in parameters.items()
        if name not in aliases
    }
    weights = Weights()
    if checkpoint.random:
        for name, (shape, dtype) in wanted.items():
            weights[name] = given.get(name) or initial(name, tuple(shape), dtype or checkpoint.dtype, checkpoint.config, checkpoint.seed)
        return weights
    if checkpoint.kind == "python":
        found = _from_module(checkpoint.module)
        model = checkpoint.module
    elif naming is not None and _as_named(naming, checkpoint, {**parameters, **aliases}, wanted, aliases, given):
        found = Converted({n: t.load() for n, t in checkpoint.tensors.items()}, {n: [n] for n in checkpoint.tensors})
    else:
        model = model if model is not None else meta_model(checkpoint, span)
        names = dict.fromkeys([*parameters, *aliases, *_state_names(model)])
        found = convert(model, checkpoint.tensors, names, span)
    sink = Sink()
    _settle_ties(found, wanted, aliases, weights)
    missing = []
    for name, (shape, dtype) in wanted.items():
        expr = given.get(name) or found.exprs.get(name)
        if expr is None:
            missing.append(name)
        else:
            weights[name] = _fit(name, expr, tuple(shape), dtype, found, span, sink)
    _report_missing(missing, wanted, found, checkpoint, model, weights, span, sink)
    _report_unexpected(found, wanted, aliases, checkpoint, model, weights, span, sink)
    sink.raise_if_failed()
    if missing:
        ordered = {name: weights[name] for name in wanted}
        weights.clear()
        weights.update(ordered)
    return weights


def _as_named(
    naming: Naming,
    checkpoint: Checkpoint,
    names: Mapping[str, Any],
    wanted: Mapping[str, Any],
    aliases: Mapping[str, str],
    given: Mapping[str, Any],
) -> bool:
    """Whether every stored tensor is the parameter of its name and nothing is missing, so that there is nothing to say."""
    there = {*checkpoint.tensors, *given, *(first for alias, first in aliases.items() if alias in checkpoint.tensors)}
    return there.issuperset(wanted) and naming.keeps(checkpoint.tensors, names)


def _state_names(model: Any) -> list[str]:
    return list(model.state_dict()) if hasattr(model, "state_dict") else []


def _from_module(module: Any) -> Converted:
    from surgery.model.realise import held

    out = Converted()
    for name, tensor in module.state_dict().items():
        out.exprs[name] = held(tensor)
        out.sources[name] = [name]
    return out


def _settle_ties(found: Converted, wanted: Mapping[str, Any], aliases: Mapping[str, str], weights: Weights) -> None:
    """A tied tensor may be stored under any of its names; where several are stored their equality is to be checked later."""
    for alias, first in aliases.items():
        expr = found.exprs.get(alias)
        if expr is None or first not in wanted:
            continue
        other = found.exprs.setdefault(first, expr)
        found.sources.setdefault(first, found.sources[alias])
        if other is not expr and other.identity != expr.identity:
            weights.twins.append((alias, other, expr))


def _fit(name: str, expr: Expr, shape: tuple[int, ...], dtype: str | None, found: Converted, span: Span | None, sink: Sink) -> Expr:
    origin = found.sources.get(name, [name])
    notes = [] if origin == [name] else [f"made from {_some(origin)}"]
    if expr.shape != shape:
        sink.error(
            "S0717", f"`{name}` is {_dims(expr.shape)} in the checkpoint but {_dims(shape)} in the model", span, notes=notes,
            help="the config and the weights do not belong together: check the sizes in config.json",
        )  # fmt: skip
    elif dtype is not None and is_float(dtype) != is_float(expr.dtype):
        kind = "a floating-point" if is_float(dtype) else "an integer"
        sink.error(
            "S0718", f"`{name}` is stored as {expr.dtype} but the model needs {kind} tensor", span, notes=notes,
            help="the checkpoint may be quantised or damaged: use the plain one it was made from",
        )  # fmt: skip
    return expr if dtype is None else cast(expr, dtype)


def _report_missing(
    missing: list[str],
    wanted: Parameters,
    found: Converted,
    checkpoint: Checkpoint,
    model: Any,
    weights: Weights,
    span: Span | None,
    sink: Sink,
) -> None:
    allowed = _patterns(getattr(model, "_keys_to_ignore_on_load_missing", None))
    head, body = [], []
    prefix = getattr(model, "base_model_prefix", "")
    headed = bool(prefix) and hasattr(model, prefix)
    for name in missing:
        if allowed is not None and allowed.search(name):
            shape, dtype = wanted[name]
            weights[name] = initial(name, tuple(shape), dtype or checkpoint.dtype, checkpoint.config, checkpoint.seed)
            weights.notes.append(
                error("S0720", f"`{name}` is not in the checkpoint and starts from its usual value", span, severity=Severity.NOTE)
            )
        elif headed and not name.startswith(prefix + "."):
            head.append(name)
        else:
            body.append(name)
    if head:
        sink.error(
            "S0715", f"the checkpoint has no weights for {len(head)} tensor{'s' * (len(head) > 1)} of the head of {checkpoint.architecture}: {_some(head)}",
            span, notes=("they would be random",),
            help=[f"set `architectures` in config.json to the class without a head, or use a checkpoint that was saved as {checkpoint.architecture}"],
        )  # fmt: skip
    if body:
        near = get_close_matches(body[0], list(found.unexpected), 3, 0.8)
        notes = [f"the checkpoint has {', '.join(f'`{n}`' for n in near)}"] if near else []
        verb = "is" if len(body) == 1 else "are"
        sink.error(
            "S0714", f"{len(body)} of {len(wanted)} tensors of {checkpoint.architecture} {verb} not in the checkpoint: {_some(body)}", span, notes=notes,
            help="check that config and weights belong together and that all shards are there",
        )  # fmt: skip


def _report_unexpected(
    found: Converted,
    wanted: Parameters,
    aliases: Mapping[str, str],
    checkpoint: Checkpoint,
    model: Any,
    weights: Weights,
    span: Span | None,
    sink: Sink,
) -> None:
    rest = dict(found.unexpected)
    unused = [name for name in found.exprs if name not in wanted and name not in aliases]
    if unused:
        weights.notes.append(
            error(
                "S0720",
                f"{_count(unused)} of {checkpoint.architecture} take no part in this program: {_some(unused)}",
                span,
                severity=Severity.NOTE,
            )
        )
    ignored = _patterns(_ignored_unexpected(model))
    prefix = getattr(model, "base_model_prefix", "")
    base_model = bool(prefix) and not hasattr(model, prefix)
    # A base model takes the keys under its prefix; the others of such a checkpoint are the heads it was trained with.
    prefixed = base_model and any(source.startswith(f"{prefix}.") for sources in found.sources.values() for source in sources)
    dropped: list[str] = []
    strange: list[str] = []
    for key, name in rest.items():
        if ignored is not None and (ignored.search(name) or ignored.search(key)):
            continue
        (dropped if prefixed and not key.startswith(f"{prefix}.") else strange).append(key)
    if dropped:
        weights.notes.append(
            error(
                "S0720",
                f"{checkpoint.architecture} has no place for {_count(dropped)} of the checkpoint's heads: {_some(dropped)}",
                span,
                severity=Severity.NOTE,
            )
        )
    if strange:
        near = get_close_matches(strange[0], list(wanted), 1, 0.8)
        notes = [f"the nearest name in the model is `{near[0]}`"] if near and near[0] not in found.exprs else []
        verb = "has" if len(strange) == 1 else "have"
        sink.error(
            "S0716", f"{_count(strange)} of the checkpoint {verb} no place in {checkpoint.architecture}: {_some(strange)}", span, notes=notes,
            help="check `architectures` and the sizes in config.json; the weights belong to another model",
        )  # fmt: skip


def _ignored_unexpected(model: Any) -> list[str]:
    """The class's own patterns, and buffers that older versions stored and newer ones compute."""
    patterns = sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    buffers = [name for name, _ in model.named_buffers()] if hasattr(model, "named_buffers") else []
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _patterns(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    joined = "|".join(f"(?:{p})" for p in sorted(patterns or ()))
    return re.compile(joined) if joined else None


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape) if shape else "a single number"


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
