"""The torch backend: the artifact folder that ``surgery.load`` opens as a trainable module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.backends import streaming
from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model import artifact, samegraph
from surgery.model.atomic import AtomicOutput
from surgery.model.narrow import placing
from surgery.model.program import Program
from surgery.model.record import Methods
from surgery.model.running import Runner, difference, is_small
from surgery.model.sample import sample_inputs
from surgery.model.threads import one_thread
from surgery.model.weights import loads

TOLERANCE = 1e-5
"""Of the largest value of the outputs, and at least this."""


class TorchBackend:
    """Writes the artifact and proves that what loads from it is what the program is, or computes what the program computes."""

    name = "torch"
    folds = False

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``dtype`` (fp32, bf16, fp16 or none). Raises S0801 to S0805 (storage, target), S0836 (does not load right),
        S0874 (a weight is beyond fp16)."""
        dtype = streaming.DTYPES.get(str(request.params.get("dtype") or ""), str(request.params.get("dtype") or ""))
        checked: dict[Path, int] | None = None if is_small(program) else {}
        weights, lanes = streaming.weights(program, request.tensors), streaming.lanes(program, request.tensors)
        with (
            placing(request.span),
            AtomicOutput(request.target, force=request.force, own=lambda path: owns(path, request.spec_digest)) as folder,
        ):
            written = artifact.write_artifact(
                folder, program, weights, dtype=dtype, files=request.files, plan=request.plan, certificates=request.certificates,
                spec=request.spec.text if request.spec else "", lock=request.lock.to_text() if request.lock else "",
                spec_digest=request.spec_digest, progress=request.counting(sum(e.nbytes for e in program.weights.values())),
                workers=lanes.workers, costs=lanes.costs, soon=lanes.soon, streams=lanes.streams, checked=checked,
            )  # fmt: skip
            if checked is not None:
                found = [compared(program, folder, checked, request.span)]
            else:
                found = self._certify(program, folder, request) if not dtype else []
            if found:
                artifact.add_certificates(folder, found)
            names = [path.relative_to(folder) for path in written]
        return Emitted((request.target, *(request.target / n for n in names)), tuple(found), ())

    @staticmethod
    def _certify(program: Program, folder: Path, request: EmitRequest) -> list[dict[str, Any]]:
        """What loads against the program itself, in fp32, on a padded batch.

        The module that loads runs a few operations in another form (see :mod:`surgery.model.peephole`), so values may differ by rounding.
        """
        inputs = sample_inputs(program, batch=2, length=13, seed=11, padding=True)
        want = Runner(program, request.tensors)(inputs)
        with one_thread(), torch.no_grad():
            got = artifact.load(folder, dtype=torch.float32).run_flat(list(inputs))  # type: ignore[operator]
        worst, scale = 0.0, 1.0
        for x, y in zip(want, got, strict=True):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                error, size = difference(x, y)
                worst, scale = max(worst, error), max(scale, size)
        tolerance = TOLERANCE * scale
        entry = {
            "claim": "loaded = program",
            "max_abs_error": worst,
            "tolerance": tolerance,
            "ok": worst <= tolerance,
            "samples": ["padded"],
        }
        if not entry["ok"]:
            raise _wrong(f"the written artifact computes something else than the program (difference {worst:.3g})", request.span)
        return [entry]


def compared(program: Program, folder: Path, checked: dict[Path, int], span: Span | None) -> dict[str, Any]:
    """The claim of :meth:`TorchBackend._certify` for a model that is too large to be run once more: what is stored is the program itself.

    While it was written every byte of the files in ``checked`` was read back and compared with what the program's tensors are (in the dtype that is
    written); here the files are opened as any reader opens them, and graph, signature, shared and frozen tensors are compared with the program's, one
    by one. Equal graphs over equal tensors compute equal values, so nothing is run. Raises S0836.
    """
    stored = artifact.read_artifact(folder, resolver=_resolver(program))
    differs = samegraph.difference(program.graph, stored.graph)
    for what in ("signature", "aliases", "frozen"):
        if not differs and getattr(program, what) != getattr(stored, what):
            differs = f"another {what}"
    files = {Path(load.file) for expr in stored.weights.values() for load in loads(expr)}
    short = sorted(path.name for path in files if checked.get(path) != path.stat().st_size)
    if not differs and (short or set(stored.weights) != {n for n in program.weights if n not in program.aliases}):
        differs = f"{short[0]} is not the file that was written" if short else "other tensors"
    if differs:
        raise _wrong(f"the written artifact is not the program: {differs}", span)
    return {
        "claim": "loaded = program", "max_abs_error": 0.0, "tolerance": 0.0, "ok": True, "samples": ["every stored byte", "every node"],
        "how": "read back and compared, not run", "bytes": sum(checked.values()), "tensors": len(stored.weights),
        "nodes": samegraph.nodes(stored.graph),
    }  # fmt: skip


def _wrong(message: str, span: Span | None) -> SurgeryError:
    return fail(
        "S0836", message, span, "emitted here", help="nothing was written; please report this with the spec and the model's config",
        exit_code=2,
    )  # fmt: skip


def _resolver(program: Program) -> Methods:
    """The classes of the methods that the program itself holds."""
    held = [*(a.method for a in program.attachments), *(m for m, _ in program.schedules)]
    known = {(m.verb, m.name): type(m) for m in held}
    return lambda verb, name: known[verb, name]


BACKEND = TorchBackend()


def load(path: str | Path, *, device: Any = "cpu", dtype: Any = None, resolver: Methods | None = None) -> nn.Module:
    """:func:`surgery.model.artifact.load` with the classes of attached modules found through the method registry."""
    return artifact.load(path, device=device, dtype=dtype, modules=artifact.modules_through(resolver) if resolver else None)
