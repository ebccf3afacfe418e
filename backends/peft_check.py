"""The certificate of an adapter folder: peft itself loads it onto the base, and the outputs are compared."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.backends.peft_parts import START, Said, collect, origin_of
from surgery.backends.protocol import EmitRequest
from surgery.backends.transformers_config import original
from surgery.backends.transformers_stacks import layout_of
from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model import pytree
from surgery.model.live import live_root
from surgery.model.program import Program, Signature
from surgery.model.running import difference, is_small
from surgery.model.sample import sample_inputs
from surgery.model.threads import one_thread
from surgery.model.weights import Init

CASES = (("random", 2, 16, False), ("padded", 3, 11, True))
TOLERANCE = 1e-5


Write = Callable[[Program, Said, Path, EmitRequest], None]
"""Writes a program's adapter into a folder."""


LARGE = "not compared with peft: running two copies of the model takes more memory than writing did"
STARTED = "not compared with peft: the base before its principal part was taken out is not stored here"
NO_MODEL = "not compared with peft: there is no transformers model that the base is"


def certify(program: Program, said: Said, folder: Path, request: EmitRequest, write: Write) -> tuple[list[dict[str, Any]], str]:
    """The certificate, or why there is none. Raises S0794 where what peft loads computes something else.

    An adapter that was not trained changes nothing, so that equal outputs would say little: it is compared once more with small values in
    the place of its zeros.
    """
    if not is_small(program):
        return [], LARGE
    if START in said.flags:
        return [], STARTED
    model = base_model(request.base or program, request.tensors)
    if model is None:
        return [], NO_MODEL
    worst, scale = _difference(program, loaded(model, folder), request)
    moved = stirred(program)
    if moved is not None and worst <= TOLERANCE * scale:
        fresh = base_model(request.base or program, request.tensors)
        with tempfile.TemporaryDirectory() as place:
            again = collect(moved, int(request.params.get("rank") or 0), request.span)
            write(moved, again, Path(place), request)
            assert fresh is not None
            worst, scale = max((worst, scale), _difference(moved, loaded(fresh, Path(place)), request))
    return judged(worst, scale, request, said.truncated), ""


def judged(worst: float, scale: float, request: EmitRequest, truncated: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The certificate of a difference between outputs of which the largest is ``scale``. Raises S0794 where it is too large; ``truncated`` are changes that
    were factored to a rank."""
    tolerance = TOLERANCE * scale
    entry = {
        "claim": "peft = program",
        "max_abs_error": worst,
        "tolerance": tolerance,
        "ok": worst <= tolerance,
        "samples": [c[0] for c in CASES],
    }
    if entry["ok"]:
        return [entry]
    also = [(span, "attached here") for span in origin_of(truncated)[:3]]
    if truncated:
        raise fail(
            "S0794", f"the changes do not fit into the rank: with peft the outputs differ by {worst:.3g}, allowed {tolerance:.3g}", request.span,
            "asked for here", also=also, help="nothing was written; ask for a larger rank, `emit peft(rank = ...)`",
        )  # fmt: skip
    raise fail(
        "S0794", f"what peft loads computes something else: the outputs differ by {worst:.3g}, allowed {tolerance:.3g}", request.span, "asked for here",
        help="nothing was written; please report this with the spec and the model's config", exit_code=2,
    )  # fmt: skip


def stirred(program: Program) -> Program | None:
    """A copy whose adapters do something: what starts at zero gets small seeded values. None where nothing starts at zero."""
    zeros = {
        first for a in program.attachments for t in a.tensors
        if isinstance(e := program.weights[first := program.aliases.get(t, t)], Init) and e.kind == "zeros"
    }  # fmt: skip
    if not zeros:
        return None
    copy = program.copy()
    for name in sorted(zeros):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        copy.weights[name] = Init(copy.weights[name].shape, copy.weights[name].dtype, "normal", (0.0, 0.1), seed)
    return copy


def base_model(base: Program, tensors: Any) -> nn.Module | None:
    """The live base model with the values that the spec started from."""
    import transformers

    config = original(base)
    cls = getattr(transformers, base.info.architecture, None) if base.info.architecture else None
    if config is None or cls is None:
        return None
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = cls(config).float().eval()
    added = {t for a in base.attachments for t in a.tensors}
    there = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    layout = layout_of(model, base, {name: name for name in base.weights})
    with torch.no_grad():
        for name in (*base.weights, *base.aliases):
            if name in layout.apart:
                for member, value in zip(layout.apart[name], tensors.of(base, name), strict=True):
                    there[member].copy_(value)
            elif name in there and name not in added:
                value = tensors.of(base, name)
                there[name].copy_(value.reshape(there[name].shape) if name in layout.flat else value)
    return model


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: nn.Module = PeftModel.from_pretrained(model, str(folder)).eval()  # type: ignore[arg-type]
    return wrapped


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """The model with an adapter folder merged into its weights, by peft."""
    wrapped: Any = loaded(model, folder)
    plain: nn.Module = wrapped.merge_and_unload()
    return plain.eval()


def both(
    root: nn.Module, model: nn.Module, signature: Signature, inputs: Sequence[torch.Tensor], span: Span | None = None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The flat outputs of a program's module and of the live model, for the same flat inputs. Raises S0794 where the live model cannot run."""
    with torch.no_grad(), one_thread():
        want = root(*inputs)
        given = pytree.unflatten(list(inputs), signature.in_spec)
        given = given if isinstance(given, Mapping) else dict(zip(signature.parameters, given, strict=True))
        try:
            out = model(**given, **{k: v for k, v in signature.constants.items() if k not in given})
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as exc:
            raise fail(
                "S0794", f"peft cannot run what it loads: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}", span, "asked for here",
                help="nothing was written; `emit torch` keeps what is attached",
            ) from exc  # fmt: skip
        return want, pytree.flatten(out, signature.out_spec)


def _difference(program: Program, model: nn.Module, request: EmitRequest) -> tuple[float, float]:
    """The largest difference of any floating output, and the largest value of one (at least 1)."""
    root = live_root(program, request.tensors, dtype=torch.float32).eval()
    signature = program.signature
    worst, scale = 0.0, 1.0
    for _, batch, length, padding in CASES:
        inputs = sample_inputs(program, batch=batch, length=length, seed=11, padding=padding)
        want, got = both(root, model, signature, inputs, request.span)
        for x, y in zip(want, got, strict=True):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                error, size = difference(x, y)
                worst, scale = max(worst, error), max(scale, size)
    return worst, scale
