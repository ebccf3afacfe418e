"""What an ONNX graph is measured to do before it is written: against torch in the same precision, and in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.backends import onnx_live
from surgery.backends.onnx_export import input_names
from surgery.backends.onnx_run import Reference, as_numpy
from surgery.backends.torch_finite import refuse_lost
from surgery.model.program import Program
from surgery.model.sample import sample_inputs, sizes
from surgery.model.threads import one_thread

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Allowed difference to torch in the same precision, times the output's scale when that is above one."""

LOSS = {"fp16": (5e-2, 0.999), "bf16": (2.5e-1, 0.99), "int8": (2e-1, 0.98)}
"""What fewer bits may cost against torch in float32: the largest difference as a share of the output's largest value, and the least cosine
between the outputs."""

CASES = (("random", 2, 16, False, 0), ("padded", 3, 23, True, 0), ("single", 1, 7, False, 0), ("cached", 2, 1, False, 6))
"""(name, batch, length, padding, past) of the inputs that the certificate measures; the last only where there is a cache."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Inputs of one kind, and what torch gives for them."""

    name: str
    batch: int
    length: int | None
    """None where no input has a length, as pixels have none."""
    inputs: list[Tensor]
    expected: list[Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """What a certificate says of the inputs."""
        return {"batch": self.batch} if self.length is None else {"batch": self.batch, "length": self.length}


def dtype_of(root: nn.Module) -> torch.dtype:
    """The type that a root computes in: that of its first floating parameter."""
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)


def cases(program: Program, call: Callable[..., Any], dtype: torch.dtype, *, judge: bool = True) -> list[Case]:
    """The inputs of the certificate with the flat outputs of ``call``. Positions that a mask switches off are compared too: both sides
    compute them. Raises S0874 or S0888 for outputs that are not finite, unless the caller will ``judge`` them itself."""
    cached = any(n.startswith("past_key_values.") for n in input_names(program))
    long = sizes(program, 1, 8) != sizes(program, 1, 9)
    found = []
    for name, batch, length, padding, past in CASES:
        if past and not cached:
            continue
        inputs = sample_inputs(program, batch=batch, length=length, seed=7, padding=padding, dtype=dtype, past=past)
        with one_thread(), torch.no_grad():
            out = call(*inputs)
        expected = [t.detach() for t in (out if isinstance(out, (tuple, list)) else (out,))]
        if judge and isinstance(call, nn.Module):
            refuse_lost(call, inputs, expected, name)
        found.append(Case(name, batch, length if long else None, inputs, expected))
    return found


def feeds_of(program: Program, run: Any, case: Case) -> dict[str, Any]:
    """The inputs of a case for a session, of those that it takes."""
    read = {i.name for i in run.get_inputs()}
    return {n: as_numpy(t) for n, t in zip(input_names(program), case.inputs, strict=True) if n in read}


def difference(want: Tensor, got: Any) -> tuple[float, float, float]:
    """Largest absolute difference, the output's largest value, and the cosine between the two, computed in float64.

    Infinite where one side is finite and the other is not, or the shapes differ; values that are infinite on both sides in the same way are equal.
    """
    import numpy as np

    a, b = want.detach().double().numpy(), got.astype("float64")
    if a.shape != b.shape:
        return math.inf, 1.0, 0.0
    if not a.size:
        return 0.0, 1.0, 1.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    fine = np.isfinite(a) & np.isfinite(b)
    if not bool((same | fine).all()):
        return math.inf, 1.0, 0.0
    a, b = np.where(fine, a, 0.0), np.where(fine, b, 0.0)
    norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    cosine = float((a * b).sum()) / norm if norm else float(not np.any(a - b))
    return float(np.abs(a - b).max()), float(np.abs(a).max()), cosine


def certify(program: Program, measured: Sequence[Case], run: Any, *, tolerance: float) -> list[Entry]:
    """Torch against a session in the same precision: per output the largest absolute difference, beside the tolerance times its scale."""
    found: list[Entry] = []
    outs = [o.name for o in run.get_outputs()]
    for case in measured:
        for name, want, got in zip(outs, case.expected, run.run(None, feeds_of(program, run, case)), strict=True):
            error, scale, _ = difference(want, got)
            allowed = tolerance * max(1.0, scale)
            # infinities that masks make stay; in half precision they may be an overflow, which is looked for behind this
            half = want.dtype == torch.float16
            finite = bool(torch.isfinite(want).all()) if half else not (want.is_floating_point() and bool(torch.isnan(want).any()))
            found.append(
                {
                    "claim": "torch = onnx", "case": case.name, "output": name, **case.sizes,
                    "max_abs_error": error, "tolerance": allowed, "ok": error <= allowed and finite,
                    **({"runtime": "onnx reference evaluator"} if isinstance(run, Reference) else {}),
                }
            )  # fmt: skip
    return found


def loss(program: Program, exact: Sequence[Case], run: Any, precision: str) -> list[Entry]:
    """What fewer bits cost: a session against torch in float32, on inputs that are the same but for their rounding."""
    share, least = LOSS[precision]
    kinds = {torch.float32: {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)}
    found: list[Entry] = []
    outs = [o.name for o in run.get_outputs()]
    for case in exact:
        rounded = Case(case.name, case.batch, case.length, [t.to(kinds.get(t.dtype, t.dtype)) for t in case.inputs], [])
        for name, want, got in zip(outs, case.expected, run.run(None, feeds_of(program, run, rounded)), strict=True):
            error, scale, cosine = difference(want, got)
            found.append(
                {
                    "claim": f"torch fp32 = onnx {precision}", "case": case.name, "output": name, **case.sizes,
                    "max_abs_error": error, "tolerance": share * scale, "cosine": cosine, "least_cosine": least,
                    "ok": error <= share * scale and cosine >= least,
                }
            )  # fmt: skip
    return found


def swaps(
    program: Program, root: nn.Module, model: Any, run: Any, names: Sequence[str], measured: Sequence[Case], tolerance: float
) -> list[Entry]:  # fmt: skip
    """Live adapters exchanged in the session: with other values of their size and, where an axis is open, of another one, the session gives
    what torch gives with them; and something else than before."""
    shapes = onnx_live.open_axes(model, names)
    sizes = [("of its own size", 0)] + (
        [("one larger where it is open", 1)] if any(isinstance(s, str) for d in shapes.values() for s in d) else []
    )
    case = measured[0]
    feeds = feeds_of(program, run, case)
    before = run.run(None, feeds)
    found: list[Entry] = []
    for what, more in sizes:
        given = onnx_live.another(root, names, shapes, more)
        with one_thread():
            expected = onnx_live.run_with(root, given, case.inputs)
        got = run.run(None, {**feeds, **{n: as_numpy(t) for n, t in given.items()}})
        worst, allowed, moved = 0.0, tolerance, 0.0
        for want, new, old in zip(expected, got, before, strict=True):
            error, scale, _ = difference(want, new)
            if error / max(1.0, scale) >= worst / max(1.0, allowed / tolerance):
                worst, allowed = error, tolerance * max(1.0, scale)
            moved = max(moved, difference(torch.from_numpy(old.astype("float64")), new)[0])
        found.append(
            {
                "claim": "torch = onnx with another adapter", "adapter": what, "tensors": len(names), "max_abs_error": worst, "tolerance": allowed,
                "moved": moved, "ok": worst <= allowed and moved > 0,
            }
        )  # fmt: skip
    return found


def chained(
    program: Program, measured: Sequence[Case], encoder: Any, decoder: Any, tolerance: float, states: str, mask: str
) -> list[Entry]:
    """The encoder's session, then the decoder's with its output, against the whole model in torch."""
    import numpy as np

    names = input_names(program)
    found: list[Entry] = []
    for case in measured:
        given = {n: as_numpy(t) for n, t in zip(names, case.inputs, strict=True)}
        (hidden,) = encoder.run(None, {i.name: given[i.name] for i in encoder.get_inputs()})
        given |= {states: hidden, mask: given.get("attention_mask", np.zeros(0))}
        results = dict(
            zip(
                [o.name for o in decoder.get_outputs()],
                decoder.run(None, {i.name: given[i.name] for i in decoder.get_inputs()}),
                strict=True,
            )
        )
        results["encoder_last_hidden_state"] = hidden
        for name, want in zip(_flat_names(program), case.expected, strict=True):
            error, scale, _ = difference(want, results[name])
            allowed = tolerance * max(1.0, scale)
            found.append(
                {
                    "claim": "whole model = encoder, then decoder", "case": case.name, "output": name, **case.sizes,
                    "max_abs_error": error, "tolerance": allowed, "ok": error <= allowed,
                }
            )  # fmt: skip
    return found


def _flat_names(program: Program) -> list[str]:
    from surgery.backends.onnx_export import output_names

    outputs = program.graph.graph.output_node().args[0]
    return output_names(program, len(outputs) if isinstance(outputs, (tuple, list)) else 1)
