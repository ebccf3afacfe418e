"""Samples given as tensors: a safetensors file whose names are the model's inputs (and labels)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.near import suggestion
from surgery.model.data import Samples
from surgery.model.data_text import Ask, check_ids, choice, too_few, unreadable
from surgery.model.losses import task_of
from surgery.model.program import Program, ValueSpec
from surgery.model.sample import placeholders

MADE = ("attention_mask", "decoder_attention_mask", "token_type_ids", "position_ids", "decoder_position_ids", "pixel_mask")
"""Inputs that are made when they are not given."""


def tensor_samples(ask: Ask, program: Program) -> Samples:
    """Raises S0740-S0742, S0745-S0747 and S0749."""
    given = _read(ask)
    inputs = _inputs(program)
    labels = _labels(program)
    _names(ask, given, inputs, labels, program)
    count = _count(ask, given)
    given = {name: _typed(ask, name, value, inputs.get(name)) for name, value in given.items()}
    _sizes(ask, given, inputs)
    for name in ("input_ids", "decoder_input_ids"):
        if name in given and given[name].numel():
            low, high = int(given[name].min()), int(given[name].max())
            if low < 0:
                raise fail("S0749", f"`{name}` holds the token id {low}", ask.span, "ids out of range", help="token ids start at 0")
            check_ids(high, program, ask.span, f"`{name}`", "tokenise with the tokenizer of this model")
    if ask.samples is not None and ask.samples > count:
        raise too_few(ask, count)
    order = choice(count, ask.samples or count, ask.seed)
    rows = [{name: value[i].clone() for name, value in given.items()} for i in order]
    return Samples(rows, ask.batch, 0, ask.shown)


def _read(ask: Ask) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(ask.path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except OSError as exc:
        raise unreadable(ask, exc) from None
    except (SafetensorError, ValueError, KeyError, AttributeError) as exc:
        why = (str(exc).strip().splitlines() or [""])[0]
        raise fail(
            "S0745", f"{ask.shown} is not a safetensors file: {why[:120]}", ask.span, "cannot be read",
            help="write it with `safetensors.torch.save_file({...}, path)`; files of pickled tensors are not opened",
        ) from None  # fmt: skip


def _inputs(program: Program) -> dict[str, ValueSpec]:
    """The inputs of the model that are one tensor each, with their types; caches are made."""
    specs = dict(placeholders(program))
    return {n: specs[n] for n in program.signature.parameters if n in specs}


def _labels(program: Program) -> tuple[str, ...]:
    task = task_of(program.info.architecture)
    return tuple(a for a in task.arguments if a != "return_loss") if task is not None else ()


def _names(ask: Ask, given: Mapping[str, Tensor], inputs: Mapping[str, ValueSpec], labels: tuple[str, ...], program: Program) -> None:
    known = [*inputs, *labels]
    for name in given:
        if name not in known:
            help, notes = suggestion(name, known, "inputs")
            raise fail(
                "S0746", f"{ask.shown} holds `{name}`, which is no input of the model", ask.span, "wrong names", notes=notes,
                help=help or f"its names must be among {', '.join(known)}",
            )  # fmt: skip
    derived = {"decoder_input_ids"} if "input_ids" in given or "labels" in given else set()
    missing = [n for n in inputs if n not in given and n not in MADE and n not in derived]
    if missing or not given:
        names = ", ".join(f"`{n}`" for n in missing or inputs)
        raise fail(
            "S0746", f"{ask.shown} lacks {names}", ask.span, "wrong names", notes=(f"it holds {', '.join(given) or 'nothing'}",),
            help=f"the model reads {', '.join(inputs)}; masks, types and positions may be left out",
        )  # fmt: skip


def _count(ask: Ask, given: Mapping[str, Tensor]) -> int:
    counts = {name: (t.shape[0] if t.ndim else 0) for name, t in given.items()}
    first = next(iter(counts.values()))
    odd = next((n for n, c in counts.items() if c != first), None)
    if odd is not None:
        raise fail(
            "S0747", f"the tensors of {ask.shown} have unlike numbers of samples: {', '.join(f'`{n}` {c}' for n, c in counts.items())}",
            ask.span, "first axes differ", help="the first axis of every tensor counts the samples",
        )  # fmt: skip
    if not first:
        raise fail("S0741", f"{ask.shown} holds no sample", ask.span, "empty", help="the first axis of every tensor counts the samples")
    hollow = next((n for n, t in given.items() if not t.numel()), None)
    if hollow is not None:
        raise fail(
            "S0741", f"the samples of {ask.shown} are empty: `{hollow}` has the shape {list(given[hollow].shape)}", ask.span, "empty",
            help="give each sample a token or more",
        )  # fmt: skip
    mask = given.get("attention_mask")
    bare = [] if mask is None else (mask.reshape(first, -1) == 0).all(1).nonzero().flatten().tolist()
    if bare:
        raise fail(
            "S0741", f"`attention_mask` of {ask.shown} leaves sample {bare[0]} without a token", ask.span, "empty",
            help="ones stand for tokens and zeros for padding; leave such samples out",
        )  # fmt: skip
    return first


def _typed(ask: Ask, name: str, value: Tensor, spec: ValueSpec | None) -> Tensor:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise fail(
            "S0747", f"`{name}` of {ask.shown} holds values that are not finite", ask.span, "NaN or infinite", help="leave such samples out"
        )
    if spec is None:
        return value if value.is_floating_point() else value.long()
    wanted = getattr(torch, spec.dtype)
    if wanted.is_floating_point != value.is_floating_point():
        raise fail(
            "S0747", f"`{name}` of {ask.shown} is {_name(value.dtype)}, the model reads {'floating' if wanted.is_floating_point else 'integer'} values",
            ask.span, "wrong type", help=f"store it as {'float32' if wanted.is_floating_point else _name(wanted)}",
        )  # fmt: skip
    return value.float() if value.is_floating_point() else value.to(wanted)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(ask: Ask, given: Mapping[str, Tensor], inputs: Mapping[str, ValueSpec]) -> None:
    """Every axis that the model fixes has its size; axes of one symbol have one size (a cache is empty)."""
    known: dict[Any, tuple[int, str]] = {}
    specs = [(n, spec, given[n]) for n, spec in inputs.items() if n in given]
    for name, spec, value in specs:
        if value.ndim != len(spec.shape):
            raise _shape(ask, name, spec, value, "")
        for size, want in zip(value.shape, spec.shape, strict=True):
            if getattr(want, "is_Symbol", False):
                known.setdefault(want, (size, name))
    for name, spec, value in specs:
        for axis, (size, want) in enumerate(zip(value.shape, spec.shape, strict=True)):
            symbols: set[Any] = getattr(want, "free_symbols", set())
            number = int(want.subs({s: known[s][0] if s in known else 0 for s in symbols})) if symbols else int(want)
            if axis and size != number:
                other = next((known[s][1] for s in symbols if s in known and known[s][1] != name), "")
                raise _shape(ask, name, spec, value, other)


def _shape(ask: Ask, name: str, spec: ValueSpec, value: Tensor, other: str) -> Exception:
    wanted = "[" + ", ".join("samples" if i == 0 else str(n) if isinstance(n, int) else "any" for i, n in enumerate(spec.shape)) + "]"
    more = f" and to fit `{other}`" if other else ""
    return fail(
        "S0747", f"`{name}` of {ask.shown} has the shape {list(value.shape)}, the model needs {wanted}{more}", ask.span, "wrong shape",
        help="the first axis counts the samples, the others are those of the model's input",
    )  # fmt: skip
