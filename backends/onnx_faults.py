"""Diagnostics of the onnx backend: what a graph cannot be, and what it was measured not to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends import onnx_live
from surgery.backends.onnx_certify import Case, feeds_of
from surgery.backends.onnx_export import quiet, traced
from surgery.backends.onnx_finite import first_overflow, lost_weights
from surgery.backends.protocol import EmitRequest
from surgery.core.diagnostics import SurgeryError, error, fail
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.model.retarget import graphs_of


@dataclass(frozen=True)
class Live:
    """What stays live in a graph: the root that was to be exported, the modules and the names of their tensors."""

    program: Program
    root: fx.GraphModule
    modules: frozenset[str] = frozenset()
    names: Sequence[str] = ()


def no_cache(program: Program, span: Span | None) -> SurgeryError:
    family = program.info.family or program.info.architecture or "this model"
    return fail(
        "S0876", f"{family} has no cache of keys and values to give", span, "asked for here",
        help="leave `cache` out: it is given where the model has one, which decoders do",
    )  # fmt: skip


def no_decoder_cache(program: Program, why: str, span: Span | None) -> SurgeryError:
    family = program.info.family or program.info.architecture or "this model"
    return fail(
        "S0876", f"the decoder of {family} cannot be written with a cache: {why}", span, "asked for here",
        help="leave `cache` out: the decoder then reads all target tokens so far",
    )  # fmt: skip


def half_chooses(root: torch.nn.Module, precision: str) -> list[str]:
    """What to say of a model that picks experts from rounded scores."""
    half = precision in ("fp16", "bf16")
    if half and any(n.target is torch.ops.aten.topk.default for _, gm in graphs_of(root) for n in gm.graph.nodes):
        return [
            f"a token whose experts score alike within the rounding of {precision} may be sent to another one: write `precision = fp32`"
        ]
    return []


def refuse_other(found: list[dict[str, Any]], span: Span | None, more: Sequence[str] = ()) -> None:
    """S0842 where a certificate does not hold; ``more`` is what may be the cause."""
    bad = [c for c in found if not c["ok"]]
    if bad:
        raise SurgeryError(
            error(
                "S0842", "the ONNX graph does not compute what the module computes", span, "asked for here",
                notes=[f"{what(c)}: error {c['max_abs_error']:.3g}, allowed {c['tolerance']:.3g}" for c in bad],
                help=["nothing was written", *more] if more else "nothing was written; try another opset, and please report the model's config",
            )
        )  # fmt: skip


def what(c: Mapping[str, Any]) -> str:
    return f"{c['output']} on {c['case']} input" if "output" in c else str(c["claim"])


def refuse_lost(root: Any, program: Program, request: EmitRequest, span: Span | None) -> None:
    """S0874 for weights that half precision has no number for."""
    lost = lost_weights(root, lambda name: request.tensors.of(program, name))
    if lost:
        name, size = lost[0]
        raise fail(
            "S0874", f"`{name}` overflows in fp16: it holds {size:.6g}, and the largest number is 65504", span, "asked for here",
            notes=[f"`{n}` holds {s:.6g}" for n, s in lost[1:5]], help="write `precision = bf16`, which has the range of fp32, or `fp32`",
        )  # fmt: skip


def refuse_overflow(found: list[dict[str, Any]], program: Program, model: Any, run: Any, measured: list[Case], span: Span | None) -> None:
    """S0874 when the outputs are not finite: which value of the graph was the first that is not."""
    bad = [c for c in found if not c["ok"]]
    lost = [m for m in measured if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in m.expected)]
    if not bad or not (lost or any(c["max_abs_error"] == float("inf") for c in bad)):
        return
    case = next((m for m in measured if m.name == bad[0].get("case")), (lost or measured)[0])
    where = first_overflow(model, feeds_of(program, run, case))
    raise fail(
        "S0874", "this model overflows in fp16: its outputs are not finite", span, "asked for here",
        notes=[f"on {case.name} input the first value that is not finite is {where}" if where else f"on {case.name} input, in torch"],
        help="nothing was written; write `precision = bf16`, which has the range of fp32, or `fp32`",
    )  # fmt: skip


def refuse_loss(found: list[dict[str, Any]], precision: str, span: Span | None) -> None:
    bad = [c for c in found if not c["ok"]]
    if bad:
        raise fail(
            "S0878", f"{precision} changes the output by more than is allowed", span, "asked for here",
            notes=[
                f"{what(c)}: error {c['max_abs_error']:.3g}, allowed {c['tolerance']:.3g}; cosine {c['cosine']:.4f}, at least {c['least_cosine']:g}" for c in bad
            ],
            help="nothing was written; write a precision with more bits",
        )  # fmt: skip


def unrunnable(exc: Exception, span: Span | None) -> SurgeryError:
    """S0842 for a graph at which the runtime stops."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return SurgeryError(
        error(
            "S0842", "onnxruntime stops in the ONNX graph", span, "asked for here", notes=lines[:2] or [type(exc).__name__],
            help="nothing was written; write `optimize = none`, and please report the model's config",
        )
    )  # fmt: skip


def inexpressible(exc: Exception, span: Span | None, opset: int, live: Live | None = None) -> SurgeryError:
    """S0841 with the operations that have no translation, else with the exporter's own first lines; S0871 when a live adapter is what
    needs such an operation."""
    text, cause, innermost = str(exc), exc.__cause__, ""
    while cause is not None:
        text, innermost, cause = f"{text}\n{cause}", str(cause), cause.__cause__
    missing = sorted(set(re.findall(r"No (?:ONNX function|decomposition|translation) found for.*?([\w]+[.:]+[\w.]+)", text)))
    missing += sorted(set(re.findall(r"OpOverload\(op='([\w.]+)'", text)) - set(missing)) if "No ONNX function" in text else []
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [
        line.strip()
        for line in plain.splitlines()
        if line.strip() and not line.strip().startswith(("#", "- If ", "- Create ", "Failed to convert", "Failed to decompose"))
    ]
    if cause_lines := [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", innermost).splitlines() if line.strip()]:
        lines = [
            *cause_lines[:1],
            *(line for line in lines if line not in cause_lines),
        ]  # what went wrong, in front of what it went wrong in
    help = "emit torch instead, or try another opset"
    if "bfloat16" in plain and opset < 22:
        help = "write `opset = 22`: older ones have no convolutions and poolings in bf16"
    names = _blamed(live, missing) if live is not None and live.names and missing else []
    if names:
        quoted = ", ".join(f"`{n}`" for n in names)
        return fail(
            "S0871", f"{quoted} cannot stay live in ONNX: there is no operation for {', '.join(dict.fromkeys(missing))}", span, "asked for here",
            help="leave it out of `live`, then it is folded where it can be, or use `emit torch`",
        )  # fmt: skip
    what = f"ONNX has no operation for {', '.join(dict.fromkeys(missing))}" if missing else "the exporter cannot express this model in ONNX"
    return fail(
        "S0841", what, span, "asked for here", notes=() if missing else tuple(lines[:3]) or (type(exc).__name__,), help=help
    )  # fmt: skip


def _blamed(live: Live, missing: Sequence[str]) -> list[str]:
    """The live adapters that compute with operations that ONNX does not have."""
    operations = {name.rpartition("::")[2].rpartition(".")[2] or name for name in missing}
    with quiet(), torch.no_grad():
        exported = traced(live.program, live.root, live.names)
        return onnx_live.blamed(exported, live.program, live.modules, operations)
