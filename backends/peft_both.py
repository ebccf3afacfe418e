"""Virtual tokens beside changes of weights: peft holds one kind in a folder, so that there are two, ``weights`` and ``tokens``.

peft runs virtual tokens in front of a model that has another adapter, too (``PeftModel`` in ``PeftModel``), with equal outputs, but its ``generate`` then calls
the inner model and leaves the tokens out. So the way that is stated and measured is to merge the weights first:

    model = PeftModel.from_pretrained(base, "DIR/weights").merge_and_unload()
    model = PeftModel.from_pretrained(model, "DIR/tokens")

Neither of the two is the adapter alone; nothing stands in the folder above them, so that peft refuses that folder and does not load half of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.backends import peft_check, peft_tokens
from surgery.backends.peft_parts import START, Said, collect
from surgery.backends.peft_tokens import Tokens
from surgery.backends.protocol import EXPORT_RECORD, EmitRequest
from surgery.core.source import Span
from surgery.model.atomic import storage_errors
from surgery.model.program import Program
from surgery.model.running import is_small

WEIGHTS, TOKENS = "weights", "tokens"
HOW = (
    f"two adapters, `{WEIGHTS}` and `{TOKENS}`: peft has to merge the first into the base (`merge_and_unload`) before it puts the second in front; "
    "with one inside the other, its `generate` leaves the tokens out"
)

Write = Callable[[Program, Tokens | None, Said | None, Path, EmitRequest], None]
"""Writes what there is of the two into a folder."""


def held(program: Program, params: Mapping[str, Any], span: Span | None) -> tuple[Tokens | None, Said | None]:
    """The virtual tokens of a program and the changes of its weights, at least one of them. Raises S0792 and S0793."""
    tokens = peft_tokens.tokens_of(program, span)
    rank = int(params.get("rank") or 0)
    if tokens is None:
        return None, collect(program, rank, span)
    if len(tokens.own) == len(program.attachments):
        return tokens, None
    tables = frozenset({tokens.prefix.table} if tokens.prefix else set()) - {""}
    return tokens, collect(program, rank, span, tokens.own, tables)


def places(folder: Path) -> tuple[Path, Path]:
    """The folders of the two, made."""
    made = folder / WEIGHTS, folder / TOKENS
    with storage_errors(folder):
        for place in made:
            place.mkdir(exist_ok=True)
    return made


def note_base(folder: Path, base: Mapping[str, str]) -> None:
    """Writes into both which model they belong to, as the record of a single folder says it."""
    for place in places(folder):
        with storage_errors(folder):
            (place / EXPORT_RECORD).write_text(json.dumps({"schema": "surgery.export/1", "base": base}, indent=1) + "\n", encoding="utf-8")


def certify(
    program: Program, tokens: Tokens, said: Said, folder: Path, request: EmitRequest, write: Write
) -> tuple[list[dict[str, Any]], str]:
    """The certificate, or why there is none, as :func:`peft_check.certify` gives it for one. Raises S0794."""
    if not is_small(program):
        return [], peft_check.LARGE
    if START in said.flags:
        return [], peft_check.STARTED
    model = _model(program, folder, request)
    if model is None:
        return [], peft_check.NO_MODEL
    worst, scale = peft_tokens.difference(program, tokens, model, request)
    stirred = peft_check.stirred(program)
    if stirred is not None and worst <= peft_check.TOLERANCE * scale:
        with tempfile.TemporaryDirectory() as place:
            mine, low = held(stirred, request.params, request.span)
            write(stirred, mine, low, Path(place), request)
            fresh = _model(program, Path(place), request)
            assert mine is not None and fresh is not None
            worst, scale = max((worst, scale), peft_tokens.difference(stirred, mine, fresh, request))
    return peft_check.judged(worst, scale, request, said.truncated), peft_tokens.untyped(program, tokens)


def _model(program: Program, folder: Path, request: EmitRequest) -> nn.Module | None:
    base = peft_check.base_model(request.base or program, request.tensors)
    if base is None:
        return None
    weights, tokens = places(folder)
    return peft_check.loaded(peft_check.merged(base, weights), tokens)
