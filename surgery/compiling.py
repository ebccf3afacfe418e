"""The second half of ``compile``: weights are realised, claims are measured, outputs are written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.core import ast
from surgery.core.diagnostics import Severity, SurgeryError, fail
from surgery.core.lock import Lock
from surgery.core.plan import Expectation
from surgery.core.source import Span
from surgery.core.spec import Checked, Spec
from surgery.expecting import failed, judge
from surgery.folding import fold_all as fold_all
from surgery.folding import live_modules, live_names, probed, widened
from surgery.folding import stir as stir
from surgery.model import masked
from surgery.model.claims import Claim
from surgery.model.live import Tensors
from surgery.model.narrow import placing
from surgery.model.program import Origin, Program
from surgery.model.running import Runner, difference, floats, is_small
from surgery.model.sample import sample_inputs
from surgery.model.study_run import check_finite
from surgery.model.threads import one_thread
from surgery.passes import registry
from surgery.passes.expect import measure
from surgery.session import Emission, Session, placed

SAMPLES = (("random", 2, 16, False), ("padded", 3, 11, True))
"""(name, batch, length, padding) of the inputs on which equal outputs are measured."""

DEFAULT_TOLERANCE = {"init": 1e-5, "fold": 1e-5}


def _computes(program: Program) -> Span | None:
    """The first statement that divides blocks into experts: what it makes of weights is computed when they are written."""
    return next((o.span for entries in program.journal.entries.values() for o in entries if o.verb == "convert"), None)


@dataclass
class Compilation:
    """Measures and emits what a session left. ``written``, ``certificates`` and ``notes`` fill as it runs."""

    session: Session
    checkpoint: Any
    out: Path
    force: bool
    lock: Lock
    progress: Callable[..., None]
    locked: Callable[[], tuple[list[Any], str]]
    written: list[Path] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    emitted: list[tuple[str, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        study = self.session.study
        self.tensors = Tensors(registry.function) if study is None else study.tensors
        self._measured: list[tuple[Program, list[list[torch.Tensor]]]] = []

    def run(self) -> None:
        """Claims first, then outputs: a claim that fails stops everything before the first byte is written."""
        self.identity()
        for claim in self.session.claims:
            try:
                self.settle(claim)
            except SurgeryError as fault:
                raise placed(fault, claim.span) from fault
        for _, before, after in self.session.folds:
            self.zeros_kept(before, after)
        for checked, program, index in self.session.checks:
            self.check(checked, program, index)
        self.session.sink.raise_if_failed()
        for emission in self.session.emissions:
            try:
                with placing(emission.checked.node.span):
                    self.emit(emission)
            except SurgeryError as fault:  # weights that are computed from others late, when they are written
                raise placed(fault, _computes(emission.program) or emission.checked.node.span) from fault

    # ------------------------------------------------------------ claims

    def outputs(self, program: Program) -> list[list[torch.Tensor]]:
        """The flat floating outputs of a program in float32 on the sample inputs."""
        for known, found in self._measured:
            if known is program:
                return found
        run = Runner(program, self.tensors)
        found = []
        for i, (_, batch, length, padding) in enumerate(SAMPLES):
            self.progress("running the model on sample inputs", i, len(SAMPLES))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # some models draw in evaluation, too: all programs draw the same
                found.append(floats(run(sample_inputs(program, batch=batch, length=length, seed=3, padding=padding))))
        self._measured.append((program, found))
        return found

    def compare(self, claim: str, left: Program, right: Program, tolerance: float, *, relative: bool = True) -> dict[str, Any]:
        """Largest absolute difference of any output on any sample, beside the tolerance.

        ``relative``: a tolerance is meant for outputs of size one and grows with the largest value of an output, as rounding does.
        """
        self.progress(f"measuring: {claim}")
        worst, allowed, share = 0.0, tolerance, 0.0
        for a, b in zip(self.outputs(left), self.outputs(right), strict=True):
            for x, y in zip(a, b, strict=True):
                error, scale = difference(x, y, relative=relative)
                if error / scale > share:
                    worst, allowed, share = error, tolerance * scale, error / scale
        ok = worst <= allowed
        known = next((c for c in self.certificates if c["claim"] == claim and c["max_abs_error"] == worst), None)
        if known is not None and ok and known["ok"]:
            known["tolerance"] = min(known["tolerance"], allowed)  # one claim, measured once, at the strictest limit asked for
            return known
        entry = {"claim": claim, "max_abs_error": worst, "tolerance": allowed, "ok": ok, "samples": [s[0] for s in SAMPLES]}
        self.certificates.append(entry)
        return entry

    def settle(self, claim: Claim) -> None:
        """Measures what a pass promised of its change; raises S0904 when it does not hold, S0752 where the weights are to blame."""
        worst, allowed, share = 0.0, claim.tolerance, 0.0
        samples = (("", 0, 0, False),) if claim.inputs else SAMPLES
        for i, (_, batch, length, padding) in enumerate(samples):
            self.progress(f"measuring: {claim.text}", i, len(samples))
            inputs = [] if claim.inputs else sample_inputs(claim.program, batch=batch, length=length, seed=3, padding=padding)
            with one_thread(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # some models draw in evaluation, too: both sides draw the same
                left = claim.expected(self.tensors, inputs)
                torch.manual_seed(0)
                right = claim.found(self.tensors, inputs)
            for x, y in zip(left, right, strict=True):
                error, scale = difference(x, y)
                if error / scale > share:
                    worst, allowed, share = error, claim.tolerance * scale, error / scale
        entry = {
            "claim": claim.text,
            "max_abs_error": worst,
            "tolerance": allowed,
            "ok": worst <= allowed,
            "samples": [claim.inputs or s[0] for s in samples],
        }
        self.certificates.append(entry)
        if not entry["ok"]:
            for name in claim.program.weights if math.isinf(worst) else ():
                check_finite(name, self.tensors.of(claim.program, name), claim.span)
            raise fail(
                "S0904", f"{claim.text} does not hold: the outputs differ by {worst:.3g}, allowed {allowed:.3g}", claim.span, "made here",
                help="nothing was written; please report this with the spec and the model's config", exit_code=2,
            )  # fmt: skip

    def zeros_kept(self, before: Program, after: Program) -> None:
        """A fold leaves every zero of masked weights at zero; raises S0904 when it does not."""
        entry = masked.certificate(before, after, self.tensors.of)
        if entry is None:
            return
        self.certificates.append(entry)
        if not entry["ok"]:
            raise fail(
                "S0904", f"{entry['claim']}, and {entry['max_abs_error']:,.0f} of them do not hold", help="nothing was written; please report this",
                exit_code=2,
            )  # fmt: skip

    def identity(self) -> None:
        """The methods' own promise: what statements attach leaves the output as it was, exactly or within the stated bound.

        It is measured over each run of statements that only attach: folds and changes of structure have claims of their own.
        """
        for before, after in self.session.stretches:
            old = {a.module for a in before.attachments}
            new = [a for a in after.attachments if a.module not in old]
            if not new or any(a.method.identity == "changed" for a in new):
                continue
            bound = max([1e-5, *(a.method.identity_bound for a in new)])
            entry = self.compare("unchanged at init", before, after, bound)
            if not entry["ok"]:
                names = sorted({f"{a.origin.verb} {a.method.name}" for a in new})
                raise fail(
                    "S0903", f"{', '.join(names)} changed the output at init by {entry['max_abs_error']:.3g}, promised {bound:.3g}",
                    new[0].origin.span, "made here", help="please report this with the spec and the model's config", exit_code=2,
                )  # fmt: skip

    def check(self, checked: Checked, program: Program, index: int) -> None:
        node = checked.node
        if isinstance(node, ast.ExpectQuantity):
            from surgery.passes.resolve import pick

            sites = pick(program, node.selectors, self.session.sink) if node.selectors else None
            found = measure(program, node.quantity, sites, node.of, read=lambda name: self.tensors.of(program, name))
            outcome = judge(self.session, node, found)
            self.session.plan.expectations[index] = outcome
            if not outcome.ok:
                self.session.sink.add(failed(outcome, node))
            return
        assert isinstance(node, ast.ExpectCheck) and checked.call is not None
        CHECKS[checked.call.name](self, checked, program, index)

    def outcome(self, checked: Checked, index: int, ok: bool, value: float | None, limit: float | None, detail: str) -> None:
        node = checked.node
        before = self.session.plan.expectations[index]
        self.session.plan.expectations[index] = Expectation(before.text, ok, value, limit, detail, before.span)
        if not ok:
            self.session.sink.error("S0602", f"expected {before.text}", node.span, detail, help=_advice(checked), severity=Severity.ERROR)

    # ------------------------------------------------------------ outputs

    def target(self, emission: Emission) -> Path:
        node = emission.checked.node
        assert isinstance(node, ast.Emit)
        return self.out / node.to

    def emit(self, emission: Emission) -> None:
        from surgery.backends import registry as backends

        node, call = emission.checked.node, emission.checked.call
        assert isinstance(node, ast.Emit) and call is not None
        self.progress(f"emitting {call.name} to {node.to}")
        backend = backends.get(call.name, node.span)
        program = emission.program
        live = call.values().get("live")
        if backend.folds and live is not True:
            program = self.folded(program, node, live_names(live), emission.folded)
        emitted = backend.emit(
            program,
            backends.request(
                target=self.target(emission), params=call.values(), tensors=self.tensors, base=emission.base, plan=self.session.plan.portable(),
                certificates=list(self.certificates), lock=self.lock, spec=self.session.spec.source, force=self.force, span=node.span,
                live=live_modules(program, live),
                files=tuple(getattr(self.checkpoint, "tokenizer_files", ()) or ()), progress=self.progress, earlier=tuple(self.emitted),
            ),
        )  # fmt: skip
        self.certificates.extend(emitted.certificates)
        self.written.extend(emitted.paths)
        self.notes.extend(emitted.notes)
        self.emitted.append((call.name, node.to, emitted))

    def folded(self, program: Program, node: ast.Emit, keep: frozenset[str], ready: Program | None) -> Program:
        """``ready``, the copy in which everything that can fold and is not in ``keep`` is folded, with the measured claim that this changed
        nothing; the program itself where nothing is attached."""
        if ready is None:
            return program
        origin = Origin(span=node.span, verb="emit", method="fold")
        stirred = widened(stir(program))

        def again() -> Program:
            settled = stirred.copy()
            fold_all(settled, origin, keep)
            return settled

        entry = self.probe(program, stirred, ready, again, 1e-4) or self.compare("folded = unfolded", stirred, again(), 1e-4)
        if not entry["ok"]:
            raise fail(
                "S0844", f"folding changed the output by {entry['max_abs_error']:.3g}, allowed {entry['tolerance']:.3g}", node.span,
                "folds everything that can fold", help="nothing was written; `emit onnx(live = true)` keeps what was added as it is",
            )  # fmt: skip
        if masked.masks(stirred):
            self.zeros_kept(stirred, again())
        return ready

    def probe(
        self, program: Program, before: Program, ready: Program, again: Callable[[], Program], tolerance: float
    ) -> dict[str, Any] | None:
        """``folded = unfolded`` of a large program, by some weights of each kind that folded; None where the model has to be run."""
        pairs = None if is_small(program) else probed(program, before, ready, again, self.tensors)
        if pairs is None:
            return None
        self.progress("measuring: folded = unfolded")
        worst, scale = max((difference(x, y) for x, y in pairs), key=lambda found: found[0] / found[1])
        entry = {
            "claim": "folded = unfolded", "max_abs_error": worst, "tolerance": tolerance * scale, "ok": worst <= tolerance * scale,
            "samples": [f"{len(pairs)} weights, first, middle and last of each kind"],
        }  # fmt: skip
        self.certificates.append(entry)
        return entry

    def module(self) -> nn.Module:
        from surgery.model.runtime import build_module
        from surgery.passes.kinds import schedule

        module = build_module(self.session.program, self.tensors.all(self.session.program))
        module.surgery_schedules = schedule.carried(getattr(module, "_surgery_record", {}))  # type: ignore[assignment]
        return module


def targets_free(spec: Spec, out: Path, force: bool, owner: str, model: str = "") -> None:
    """Before any work: outputs lie apart, replace nothing that the run reads, and nothing that stands at a target is lost without ``force``.

    ``owner`` is the name that the spec has in its lock, by which its own outputs are known; ``model`` takes the place of the spec's.
    """
    from surgery.backends import protocol
    from surgery.backends import registry as backends

    emits = [(c.call.name, c.node) for c in spec.statements if isinstance(c.node, ast.Emit) and c.call is not None]
    targets = [(out / node.to, node.span) for _, node in emits]
    protocol.check_apart(targets)
    protocol.check_inputs_kept(targets, _inputs(spec, model))
    for name, node in emits:
        backends.require(name, node.span)
        protocol.check_target(out / node.to, name, force, protocol.owner_mark(owner), node.span)


def _inputs(spec: Spec, model: str) -> list[tuple[Path, str]]:
    """What a run reads and where it stands, as far as that is a path: no output may take its place."""
    found = [(Path(), "the working directory"), (Path(os.path.expanduser("~")), "the home directory")]
    if spec.source.name not in ("<text>", "<stdin>"):
        own = Path(spec.source.name)
        found += [(own, "the spec"), (own.with_name(own.name + ".lock"), "the lock of the spec")]
    named = [(model, spec.source.name, "the model")] if model else []
    for checked in (*spec.models.values(), *spec.checkpoints.values(), *spec.adapters.values(), *spec.data.values()):
        node, file = checked.node, checked.node.span.source.name
        found.append((Path(file), "a file of the spec"))
        if isinstance(node, ast.Model):
            named += [] if model and checked is spec.model else [(node.ref, file, "the model")]
        elif checked.call is not None:
            named += [
                (v, file, "what the spec reads") for k, v in checked.call.values().items() if k in ("path", "ref") and isinstance(v, str)
            ]
    for ref, file, what in (n for n in named if n[0] != "minilm"):  # the encoder of the demo extra: never a folder
        path = ref.removeprefix("config:")
        for place in (Path(file).parent / path, Path(path)):
            if place.exists():
                found += [(place, what), *((inner, f"a file of {what}") for inner in (sorted(place.iterdir()) if place.is_dir() else ()))]
    return found


def _advice(checked: Checked) -> str:
    assert checked.call is not None
    return {
        "same_output": "a method that changes the output by design has no such promise: see `surgery explain METHOD`",
        "runs": "try a size that the model allows",
        "locked": "review the change, then delete the lock file and compile again to write it anew",
    }.get(checked.call.name, "")


def same_output(work: Compilation, checked: Checked, program: Program, index: int) -> None:
    assert checked.call is not None
    at = str(checked.call.get("at"))
    tolerance = checked.within if checked.within is not None else DEFAULT_TOLERANCE[at]
    claim = "unchanged at init" if at == "init" else "folded = unfolded"
    pairs = [(work.session.base, program)] if at == "init" else _folds_above(work.session, checked)
    found = []
    for before, after in pairs:
        assert before is not None
        # a limit that the spec states is a limit on the difference itself
        entry = work.compare(claim, before, after, tolerance, relative=checked.within is None)
        found.append((entry["ok"], entry["max_abs_error"], tolerance if checked.within is not None else entry["tolerance"]))
    # the fold that comes closest to its limit, or passes it most
    ok, error, allowed = max(found, key=lambda f: (not f[0], f[1] / f[2] if f[2] else f[1]))
    more = f" (the worst of {len(pairs)} folds)" if len(pairs) > 1 else ""
    work.outcome(checked, index, ok, error, allowed, f"largest difference {error:.3g}, allowed {allowed:.3g}{more}")


def _folds_above(session: Session, checked: Checked) -> list[tuple[Program | None, Program]]:
    """The program right before and right after each ``fold`` above an expectation: what else changed the model is not the fold's.

    The checker refuses the expectation where there is none.
    """
    here = next(i for i, c in enumerate(session.spec.statements) if c is checked)
    return [(before, after) for position, before, after in session.folds if position < here]


def runs(work: Compilation, checked: Checked, program: Program, index: int) -> None:
    assert checked.call is not None
    batch, length = int(checked.call.get("batch")), int(checked.call.get("length"))
    try:
        got = Runner(program, work.tensors)(sample_inputs(program, batch=batch, length=length, seed=5, padding=True, cut=False))
    except (RuntimeError, IndexError, ValueError) as exc:
        first = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        work.outcome(checked, index, False, None, None, f"fails at batch {batch}, length {length}: {first}")
        return
    finite = all(bool(torch.isfinite(t).all()) for t in floats(got))
    work.outcome(checked, index, finite, None, None, f"batch {batch}, length {length}: " + ("finite" if finite else "not finite"))


def locked(work: Compilation, checked: Checked, program: Program, index: int) -> None:
    found, detail = work.locked()
    work.outcome(checked, index, not found, None, None, detail)


CHECKS: dict[str, Callable[[Compilation, Checked, Program, int], None]] = {"same_output": same_output, "runs": runs, "locked": locked}
