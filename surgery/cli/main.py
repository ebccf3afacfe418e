"""``surgery VERB ...``: finds the verb's file, runs it, turns every failure into a diagnostic and an exit code.

0 fine, 1 findings, 2 usage, input/output or internal fault, 130 interrupted, 143 terminated; the same in every output format.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from surgery.cli.command import FAULT, Command, parser_for
from surgery.cli.report import Report, write
from surgery.core.diagnostics import SurgeryError, error, fail

VERBS = {
    "check": "check", "fmt": "fmt", "fix": "fix", "plan": "plan", "compile": "compile_", "show": "show", "select": "select",
    "diff": "diff", "bench": "bench", "explain": "explain", "methods": "methods", "new": "new", "completion": "completion",
}  # fmt: skip
"""Verb -> module of surgery.cli; only the one that runs is imported."""

GROUPS = (
    ("write", ("new", "check", "fmt", "fix")),
    ("operate", ("plan", "compile")),
    ("look", ("show", "select", "diff", "bench")),
    ("learn", ("explain", "methods", "completion")),
)

INTERRUPTED = 130
REPORT_AT = "please report it with the spec and the output of `surgery --version` to the issue tracker of model-surgery"


def command(verb: str) -> Command:
    """The table of one verb."""
    found: Command = importlib.import_module(f"surgery.cli.{VERBS[verb]}").COMMAND
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and gives its exit code. Never raises, but for ``SystemExit`` of a broken output pipe."""
    args = list(sys.argv[1:] if argv is None else argv)
    gc.set_threshold(200_000, 20, 100)  # graphs are many small objects that live to the end: looking for garbage finds none
    report = _early(args)
    pressed: list[int] = []
    before = _watch(pressed)
    try:
        code = run(args, report)
        sys.stdout.flush()
        return code
    except SurgeryError as e:
        # a library may turn the interrupt it met into a fault of its own, which then reads like a finding
        return _interrupted() if pressed else _last_words(report, e)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return _closed()
    except SystemExit as e:  # argparse: --help
        return e.code if isinstance(e.code, int) else FAULT
    except MemoryError:
        return _last_words(
            report, fail("S0901", "surgery ran out of memory", help="close other programs or use a smaller model", exit_code=FAULT)
        )
    except OSError as e:
        if e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):  # of a stream, which has no path
            return _unwritten(e)
        return _last_words(report, internal(e))
    except Exception as e:
        if os.environ.get("SURGERY_DEBUG") == "1":
            raise
        return _interrupted() if pressed else _last_words(report, internal(e))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(pressed: list[int]) -> dict[int, Any]:
    """Notes Ctrl-C in ``pressed`` and raises KeyboardInterrupt as ever, and ends on SIGTERM with what is half written cleared away; gives the
    handlers to put back."""
    found: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        return found

    def handler(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    def ended(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the clearing away
        raise SystemExit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        found[signal.SIGINT] = signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        found[signal.SIGTERM] = signal.signal(signal.SIGTERM, ended)
    return found


def internal(fault: Exception) -> SurgeryError:
    """A fault of ours as a diagnostic: what it was and where in the code, without a traceback."""
    at = fault.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" ({os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno})" if at is not None else ""
    text = str(fault).strip().split("\n", 1)[0][:300]
    if isinstance(fault, OSError) and fault.filename is not None:
        return fail(
            "S0910",
            f"{fault.filename}: {(fault.strerror or text).lower()}",
            help="check the path, its permissions and the space left",
            exit_code=FAULT,
        )
    diagnostic = error(
        "S0901", f"internal error: {type(fault).__name__}: {text or 'no message'}{where}",
        help=[REPORT_AT, "SURGERY_DEBUG=1 shows where it happened"],
    )  # fmt: skip
    return SurgeryError(diagnostic, exit_code=FAULT)


def run(args: list[str], report: Report) -> int:
    """Runs a command line; failures are raised."""
    if not args or args[0] in ("--help", "-h", "help"):
        if len(args) > 1 and args[1] in VERBS:
            parser_for(command(args[1])).print_help()
            return 0
        write(sys.stdout, overview())
        return 0 if args else FAULT
    if args[0] in ("--version", "-V"):
        from surgery.cli.versions import versions

        write(sys.stdout, versions())
        return 0
    verb = args[0]
    if verb not in VERBS:
        from surgery.core.near import suggestion

        help, notes = suggestion(verb, VERBS, "verbs")
        what = f"unknown option `{verb}`" if verb.startswith("-") else f"there is no verb `{verb}`"
        raise fail("S0911", f"surgery: {what}", help=help or ["`surgery --help` shows what there is"], notes=notes, exit_code=FAULT)
    this = command(verb)
    parsed = parser_for(this).parse_intermixed_args(args[1:])
    report.configure(parsed)
    parsed.report = report
    return this.run(parsed)


def _early(args: Sequence[str]) -> Report:
    """Format and colour before the command line is understood, so that a usage error has the right format too."""
    known = argparse.Namespace(format="text", color="auto", quiet="--quiet" in args or "-q" in args)
    for i, text in enumerate(args):
        name, sign, value = text.partition("=")
        if name in ("--format", "--color"):
            value = value if sign else (args[i + 1] if i + 1 < len(args) else "")
            if value in ("text", "json", "sarif", "github", "auto", "always", "never"):
                setattr(known, name[2:], value)
    return Report(known)


def _last_words(report: Report, fault: SurgeryError) -> int:
    """Reports what ended the run; a reader that has gone away changes nothing about the exit code."""
    try:
        code = report.failure(fault)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _closed()
        return fault.exit_code
    except OSError as e:
        return _unwritten(e)


def _unwritten(fault: OSError) -> int:
    """The output cannot be written, as on a full disk: said in words on stderr, in every format."""
    from surgery.cli.views import text

    _closed()
    found = fail("S0910", f"cannot write the output: {(fault.strerror or str(fault)).lower()}", help="check the space left where it goes")
    try:
        write(sys.stderr, text.render(found.diagnostics, color=False))
    except OSError:
        pass
    return FAULT


def _interrupted() -> int:
    try:
        write(sys.stderr, "\ninterrupted\n")
    except (BrokenPipeError, OSError):
        pass
    return INTERRUPTED


def _closed() -> int:
    """The reader of our output has gone (``surgery show ... | head``): end quietly, as other programs do."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass
    return 128 + 13


def overview() -> str:
    """``surgery --help``."""
    lines = [
        "surgery VERB ...   a compiler from a short text and a neural network to a changed network",
        "",
    ]
    for title, verbs in GROUPS:
        lines.append(f"{title}:")
        lines += [f"  {v:<12}{command(v).summary}" for v in verbs]
        lines.append("")
    lines += [
        "`surgery VERB --help` shows the arguments of a verb, `surgery --version` the versions that matter.",
        "Exit codes: 0 fine, 1 findings, 2 usage, input/output or internal fault.",
        "",
        "first steps:",
        "  surgery new spec first.surg         write a spec to start from",
        "  surgery check first.surg            check it, without a model",
        "  surgery plan first.surg             see what it would do, without reading a weight",
        "  surgery compile first.surg          do it",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
