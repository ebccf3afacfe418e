"""What the two graphs of an encoder and its decoder are together: the source through one, then the target token by token through the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.backends.onnx_certify import Case, Entry, difference
from surgery.backends.onnx_cut import MASK
from surgery.backends.onnx_export import input_names, output_names
from surgery.backends.onnx_parts import IDS
from surgery.backends.onnx_rows import holds
from surgery.backends.onnx_run import as_numpy
from surgery.model.program import Program
from surgery.model.sample import placeholders

Arrays = dict[str, Any]


def certify(whole: Program, decoder: Program, measured: Sequence[Case], first: Any, second: Any, tolerance: float) -> list[Entry]:
    """The whole model in torch against the encoder's session ``first`` and then the decoder's ``second``: the target at once, and in steps
    of one token after a beginning of up to two. ``tolerance`` is a share of each output's scale."""
    outputs = whole.graph.graph.output_node().args[0]
    names = output_names(whole, len(outputs) if isinstance(outputs, (tuple, list)) else 1)
    found: list[Entry] = []
    for case in measured:
        given = {n: as_numpy(t) for n, t in zip(input_names(whole), case.inputs, strict=True)}
        source = run(first, given)
        length = given["decoder_input_ids"].shape[1]
        for what, cuts in (("at once", [length]), ("token by token", [min(2, length), *range(3, length + 1)])):
            got = in_steps(decoder, second, given, source, cuts)
            if len(cuts) == 1:
                got["encoder_last_hidden_state"] = source["last_hidden_state"]
            for name, want in zip(names, case.expected, strict=True):
                if name not in got:
                    continue
                error, scale, _ = difference(want, got[name])
                allowed = tolerance * max(1.0, scale)
                found.append(
                    {
                        "claim": f"whole model = encoder, then decoder {what}", "case": case.name, "output": name, **case.sizes,
                        "steps": len(cuts), "max_abs_error": error, "tolerance": allowed, "ok": error <= allowed,
                    }
                )  # fmt: skip
    return found


def run(session: Any, given: Arrays) -> Arrays:
    """The outputs of a session by name, given what it reads of some arrays."""
    read = {i.name for i in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {n: v for n, v in given.items() if n in read}), strict=True))


def in_steps(decoder: Program, session: Any, given: Arrays, source: Arrays, cuts: Sequence[int]) -> Arrays:
    """The decoder's outputs for a target that is given in pieces, which end at ``cuts``; outputs along the target are put together again.

    ``source`` is what the encoder gave for ``given``.
    """
    ids, mask = given["decoder_input_ids"], given.get("decoder_attention_mask")
    state = empty(decoder, ids.shape[0], next(iter(source.values())).dtype)
    state |= {n.replace("present", "past_key_values", 1): v for n, v in source.items() if n.startswith("present.")}
    if "attention_mask" in given:
        state[MASK] = given["attention_mask"]
    pieces: list[Arrays] = []
    start = 0
    for stop in cuts:
        out = run(
            session,
            state | {"decoder_input_ids": ids[:, start:stop]} | ({} if mask is None else {"decoder_attention_mask": mask[:, :stop]}),
        )
        state |= {n.replace("present", "past_key_values", 1): v for n, v in out.items() if n.startswith("present.")}
        pieces.append({n: v for n, v in out.items() if not n.startswith("present.")})
        start = stop
    along = _along(decoder)
    return {n: np.concatenate([p[n] for p in pieces], along[n]) for n in pieces[0]}


def _along(decoder: Program) -> dict[str, int]:
    """The axis of each output that runs along the target."""
    steps = next(spec.shape[1] for name, spec in placeholders(decoder) if name == IDS)
    end = decoder.graph.graph.output_node()
    names = output_names(decoder, len(end.args[0]))  # type: ignore[arg-type]
    return {
        name: next((i for i, n in enumerate(spec.shape) if holds(n, steps)), 1) for name, spec in zip(names, end.meta["spec"], strict=True)
    }


def empty(decoder: Program, batch: int, dtype: Any) -> Arrays:
    """The decoder's own past before its first step: no steps."""
    found = {}
    for name, (flat, spec) in zip(input_names(decoder), placeholders(decoder), strict=True):
        if flat.startswith("past_key_values"):
            found[name] = np.zeros((batch, int(spec.shape[1]), 0, int(spec.shape[3])), dtype)
    return found
