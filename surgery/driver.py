"""The one file that sees every folder: parse -> check -> open -> capture -> walk -> verify -> realise -> emit.

Every function here raises :class:`~surgery.core.diagnostics.SurgeryError` and nothing else for what a user can get wrong.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgery.compiling import Compilation, targets_free
from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.lock import Lock, drift, lock_path, read_lock
from surgery.core.plan import Plan
from surgery.core.progress import Progress, listening, report
from surgery.core.source import Source, Span, portable
from surgery.core.spec import Spec
from surgery.front import check_source, source_of
from surgery.model.data_open import Shelf
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.study import Study
from surgery.opening import open_program
from surgery.passes import registry
from surgery.session import Session


@dataclass
class Result:
    """What ``compile`` gives: the plan, the paths that were written, the measured claims, the module on demand, and ``notes``: what the
    outputs are and how to run them."""

    plan: Plan
    artifacts: list[Path] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    lock: Path | None = None
    notes: list[str] = field(default_factory=list)
    _module: Callable[[], nn.Module] | None = None

    @property
    def module(self) -> nn.Module:
        """The changed model as a module that trains, built on first use."""
        assert self._module is not None
        return self._module()


def load_spec(spec: str | os.PathLike[str] | Source, sets: Mapping[str, str] | None = None) -> Spec:
    """A checked spec from a path, a source, or from text (text has a newline or starts with ``surg ``)."""
    checked, problems = check_source(source_of(spec), sets)
    if any(d.is_error for d in problems):
        raise SurgeryError(*problems)
    return checked


def model_ref(spec: Spec, model: str | nn.Module | None) -> tuple[str | nn.Module, Span | None]:
    """The reference to open: the argument, else the spec's ``model`` line."""
    if model is not None:
        return model, None
    stated = spec.model
    if stated is None:
        raise fail(
            "S0701",
            f"{spec.source.name} names no model",
            help='write `model "..."` in the spec or give one on the command line',
            exit_code=2,
        )
    node = stated.node
    assert isinstance(node, ast.Model)
    return node.ref, node.ref_span if node.ref_span.end else node.span


def _walk(
    spec: Spec,
    model: str | nn.Module | None,
    *,
    inputs: Any = None,
    dynamic: Any = "batch, sequence",
    allow_code: bool = False,
    use_cache: bool = True,
    keep_base: bool = False,
) -> tuple[Session, Any]:
    ref, span = model_ref(spec, model)
    base = Path(spec.source.name).parent if spec.source.name not in ("<text>", "<stdin>") else Path()
    report("opening the model")
    captures: dict[str, Any] | None = {} if spec.checkpoints or len(spec.models) > 1 else None
    program, checkpoint = open_program(
        ref, inputs=inputs, dynamic=dynamic, allow_code=allow_code, use_cache=use_cache, span=span, base=base, hash_content=keep_base,
        captures=captures,
    )  # fmt: skip
    from surgery.model import cost
    from surgery.passes.expect import parameter_sizes

    info = program.info
    described = {
        "ref": info.ref, "family": info.family, "hash": info.hash,
        "params": sum(parameter_sizes(program).values()), "bytes": cost.bytes_of(program),
        **({"notes": list(info.notes)} if info.notes else {}),
    }  # fmt: skip
    plan = Plan(spec=spec.source.name, edition=spec.edition, model=described)
    study = Study(Tensors(registry.function), report) if keep_base else None

    def other(ref: str, at: Span) -> Program:
        return open_program(ref, allow_code=allow_code, use_cache=use_cache, span=at, base=base, captures=captures)[0]

    session = Session(spec=spec, program=program, plan=plan, keep_base=keep_base, progress=report, study=study, open=other)
    session.data = Shelf(spec.data, checkpoint)
    session.sink.extend(getattr(program.weights, "notes", ()))
    session.run()
    return session, checkpoint


def plan(
    spec: str | os.PathLike[str] | Source,
    model: str | nn.Module | None = None,
    *,
    set: Mapping[str, str] | None = None,
    inputs: Any = None,
    allow_code: bool = False,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Everything the spec would do, from config and tensor headers alone.

    A plan with findings is returned, not raised, once the model could be opened: see ``Plan.ok`` and ``Plan.diagnostics``.
    """
    with listening(progress):
        session, _ = _walk(load_spec(spec, set), model, inputs=inputs, allow_code=allow_code, use_cache=use_cache)
    return session.plan


def compile_spec(
    spec: str | os.PathLike[str] | Source,
    model: str | nn.Module | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    set: Mapping[str, str] | None = None,
    locked: bool = False,
    inputs: Any = None,
    force: bool = False,
    allow_code: bool = False,
    use_cache: bool = True,
    write_lock: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Does what :func:`plan` shows: walks, measures every claim, then emits each output whole or not at all.

    ``out`` is the folder that relative ``to`` paths are relative to (default: the working directory). Raises SurgeryError when a
    statement, an expectation, a certificate or a lock fails; nothing that stood before is touched then. ``progress`` is called with a
    text, and with ``(text, done, total)`` where the amount of work is known.
    """
    with listening(progress):
        checked = load_spec(spec, set)
        targets_free(checked, Path(out) if out else Path(), force, _lock_name(checked), model if isinstance(model, str) else "")
        session, checkpoint = _walk(checked, model, inputs=inputs, allow_code=allow_code, use_cache=use_cache, keep_base=True)
        if session.sink.failed:
            raise SurgeryError(*session.sink.items)
        from surgery.model.atomic import together
        from surgery.model.realise import check_twins

        check_twins(session.program.weights)
        lock = make_lock(checked, session, checkpoint)
        target = lock_path(Path(checked.source.name)) if checked.source.name not in ("<text>", "<stdin>") else None
        if locked:
            _compare_lock(target, lock, _first_line(checked))
        work = Compilation(
            session=session, checkpoint=checkpoint, out=Path(out) if out else Path(), force=force, lock=lock, progress=report,
            locked=_locked_check(target, lock),
        )  # fmt: skip
        with together():
            work.run()
            result = Result(
                plan=session.plan, artifacts=work.written, certificates=work.certificates, notes=work.notes, _module=work.module
            )
            if target is not None and write_lock and not locked:
                result.lock = _write_lock(target, lock)
        if {p.suffix for p in result.artifacts} >= {".onnx", ".pt2"}:
            from surgery.benching_verdict import verdict

            result.notes.extend(verdict(result.artifacts))
        return result


def make_lock(spec: Spec, session: Session, checkpoint: Any = None) -> Lock:
    """What this run resolved to. Equal inputs give equal locks on any machine. Reads the weight files once, for their hash."""
    program = session.program
    content = checkpoint.content_hash() if checkpoint is not None and checkpoint.files else program.info.hash
    total = hashlib.sha256()
    for name in sorted(program.weights):
        total.update(f"{name}={program.weights[name].digest};".encode())
    return Lock(
        spec=_lock_name(spec),
        edition=spec.edition,
        model={"ref": portable(program.info.ref), "hash": program.info.hash, "content": content},
        data=dict(session.data.digests),
        params={k: str(v) for k, v in spec.params.items()},
        seeds=session.seeds,
        methods=session.versions,
        sites=session.resolved,
        weights=total.hexdigest(),
    )


def _lock_name(spec: Spec) -> str:
    """The file name; a text has its hash for a name, so that no other text counts as the owner of its outputs."""
    if spec.source.name in ("<text>", "<stdin>"):
        return f"<text {hashlib.sha256(spec.source.text.encode()).hexdigest()[:16]}>"
    return Path(spec.source.name).name


def _compare_lock(target: Path | None, lock: Lock, span: Span | None) -> None:
    if target is None:
        raise fail("S0405", "a spec given as text has no lock file", help="write the spec to a file")
    found = drift(read_lock(target, span), lock, span)
    if found:
        raise SurgeryError(*found)


def _first_line(spec: Spec) -> Span | None:
    """The edition line: where to point at for what concerns a spec as a whole."""
    found = re.search(r"^surg[ \t]+\d+", spec.source.text, re.MULTILINE)
    return Span(spec.source, *found.span()) if found else None


def _locked_check(target: Path | None, lock: Lock) -> Callable[[], tuple[list[Any], str]]:
    """For ``expect locked``: the drift against the lock file beside the spec, and what was found in words.

    The first compile of a spec has no lock yet and writes it, so that the expectation can be met at all; ``--locked`` is what
    refuses a missing one.
    """

    def run() -> tuple[list[Any], str]:
        if target is not None and not target.exists():
            return [], f"there is no {target.name} yet: this run is what is locked"
        try:
            _compare_lock(target, lock, None)
        except SurgeryError as exc:
            return list(exc.diagnostics), "; ".join([exc.diagnostics[0].message, *exc.diagnostics[0].notes[:3]])
        return [], "as locked"

    return run


def _write_lock(target: Path, lock: Lock) -> Path | None:
    from surgery.model.atomic import AtomicOutput

    text = lock.to_text()
    try:
        if target.read_text(encoding="utf-8") == text:
            return target
    except (OSError, UnicodeDecodeError):
        pass
    if not os.access(target.parent, os.W_OK):
        return None  # a spec in a read-only place has no lock; --locked says so when it is asked for
    with AtomicOutput(target, folder=False, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def load(path: str | os.PathLike[str], *, device: str = "cpu", dtype: Any = None) -> nn.Module:
    """The module of an emitted torch artifact: original signature and outputs, ready to train. No generated code runs."""
    from surgery.backends import to_torch
    from surgery.passes import registry

    module = to_torch.load(Path(path), device=device, dtype=dtype, resolver=registry.get)
    return with_schedules(module)


def with_schedules(module: nn.Module) -> nn.Module:
    """The module with the schedules of its record as objects, where the training controller looks for them."""
    from surgery.passes.kinds import schedule

    module.surgery_schedules = schedule.carried(getattr(module, "_surgery_record", {}))  # type: ignore[assignment]
    return module


def save(module: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Saves a loaded (and trained) module as an artifact again, whole or not at all."""
    from surgery.model.artifact import save_trained

    return save_trained(module, Path(path), force=force)


def show(ref: str, **options: Any) -> Any:
    """See :func:`surgery.inspection.show`."""
    from surgery import inspection

    return inspection.show(ref, **options)


def select(selector: str, model: str, **options: Any) -> Any:
    """See :func:`surgery.inspection.select`."""
    from surgery import inspection

    return inspection.select(selector, model, **options)


def diff(a: str, b: str, **options: Any) -> Any:
    """See :func:`surgery.inspection.diff`."""
    from surgery import inspection

    return inspection.diff(a, b, **options)
