"""What a backend is: an object that writes a program to a target, all or nothing, and says what it proved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from surgery.core.diagnostics import fail
from surgery.core.lock import Lock
from surgery.core.plan import Plan
from surgery.core.progress import Bytes
from surgery.core.source import Source, Span
from surgery.model.atomic import refuse_odd
from surgery.model.program import Program

EXPORT_RECORD = "surgery-export.json"
"""What a folder that is no artifact carries beside its own files: the owner's mark, the spec, what was measured."""


@dataclass(frozen=True)
class EmitRequest:
    """One ``emit`` statement, ready to run.

    ``params`` are the backend's parameters of the language with their values, ``tensors`` realises weights (``of(program, name)``,
    ``functions``), ``base`` is the program before the spec, ``certificates`` what was measured so far, ``files`` go along
    with the weights (tokenizer). ``force`` allows to replace what is not this spec's own output. ``live`` are the modules in the program that were
    asked to stay adapters of their own. ``earlier`` are the outputs above this one: backend, path as the spec says it, what was emitted.
    """

    target: Path
    params: Mapping[str, Any]
    tensors: Any
    base: Program | None = None
    plan: Plan | None = None
    certificates: list[dict[str, Any]] = field(default_factory=list)
    lock: Lock | None = None
    spec: Source | None = None
    force: bool = False
    span: Span | None = None
    files: tuple[Path, ...] = ()
    live: frozenset[str] = frozenset()
    earlier: tuple[tuple[str, str, Emitted], ...] = ()
    progress: Callable[..., None] = lambda *what: None

    @property
    def spec_digest(self) -> str:
        """What outputs carry so that the same spec may replace them later."""
        return owner_mark(self.lock.spec) if self.lock is not None else ""

    def counting(self, total: int) -> Callable[[str, int], None]:
        """For ``write_safetensors``: reports the bytes of weights computed and written so far, of ``total``."""
        done = 0

        def step(name: str, size: int) -> None:
            nonlocal done
            done += size
            self.progress("writing weights", done, Bytes(total))

        return step


@dataclass(frozen=True)
class Emitted:
    """``paths``: what was written, the thing to open first. ``certificates``: claims measured on the output, with numbers.
    ``fusions``: one record a fusion rule, where the output is a fused graph."""

    paths: tuple[Path, ...]
    certificates: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    fusions: tuple[dict[str, Any], ...] = ()


class Backend(Protocol):
    """``name`` as in ``emit NAME``; ``folds`` when it wants everything foldable folded first. A backend that can say before any weight is read
    that it cannot write a program has ``check(program, span)``, which raises the diagnostic; plans call it. One that has something to say of an
    output in the plan has ``plan(program, params, live, span) -> Iterable[str]``: it gets the program before folding, and raises as well.

    ``emit`` raises SurgeryError with an S08 code and leaves what stood at the target untouched.
    """

    name: str
    folds: bool

    def emit(self, program: Program, request: EmitRequest) -> Emitted: ...


def owner_mark(spec: str) -> str:
    """The mark that outputs of a spec of this file name carry; long and derived, so that no other file has it by chance."""
    return "surgery-output-" + hashlib.sha256(spec.encode()).hexdigest()[:24]


def owns(path: Path, digest: str) -> bool:
    """Whether what stands at ``path`` was made by the spec of this digest: outputs carry it (a folder in its ``surgery.json`` or
    ``surgery-export.json``)."""
    if not digest or path.is_symlink():
        return False
    file = path
    if path.is_dir():
        file = path / ("surgery.json" if (path / "surgery.json").exists() else EXPORT_RECORD)
    needle, kept = digest.encode(), b""
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                if needle in kept + chunk:
                    return True
                kept = chunk[-len(needle) :]
    except OSError:
        pass
    return False


def check_target(path: Path, backend: str, force: bool, digest: str, span: Span | None = None) -> None:
    """Before any work: S0803 when something else stands at the target of an ``emit`` and ``force`` is not given, and for devices and pipes always."""
    refuse_odd(path, span, f"emit {backend} would replace it")
    if force or not (path.exists() or path.is_symlink()) or owns(path, digest):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    raise fail(
        "S0803", f"{path} exists and is not this spec's own output", span, f"emit {backend} would replace it", exit_code=2,
        help="choose another path, or replace it with `--force`",
    )  # fmt: skip


def check_apart(targets: Sequence[tuple[Path, Span]]) -> None:
    """Before any work: S0403 when two outputs are one place and S0845 when one lies inside another, links followed.

    The checker sees this in what the spec says; here absolute paths, links and ``--out`` are known too.
    """
    real = [(Path(os.path.realpath(path)), path, span) for path, span in targets]
    for i, (place, path, span) in enumerate(real):
        for other, written, first in real[:i]:
            also = [(first, "the other is written here")]
            if place == other:
                raise fail(
                    "S0403",
                    f"{path} and {written} are one place",
                    span,
                    "written again here",
                    also=also,
                    help="give each output a path of its own",
                )
            if place in other.parents or other in place.parents:
                inner, outer = (path, written) if other in place.parents else (written, path)
                raise fail(
                    "S0845", f"{inner} is inside {outer}, which is an output of its own", span, "one output in another", also=also,
                    help="give each output a path beside the others",
                )  # fmt: skip


def check_inputs_kept(targets: Sequence[tuple[Path, Span]], inputs: Sequence[tuple[Path, str]]) -> None:
    """Before any work: S0846 when an output would replace something that the run needs, or a folder around it; ``force`` or not.

    ``inputs`` are paths with what they are: the spec, models, data, the working directory. A folder is replaced as a whole, so that
    all the user's files in it would be gone. Links are followed.
    """
    for path, span in targets:
        place = Path(os.path.realpath(path))
        for given, what in inputs:
            real = Path(os.path.realpath(given))
            if place == real or place in real.parents:
                raise fail(
                    "S0846", f"{path} is {what}" if place == real else f"{path} holds {what}", span, "all of it would be replaced",
                    exit_code=2, notes=[f"it is at {given}"] if place != real else [], help="give the output a path of its own",
                )  # fmt: skip
