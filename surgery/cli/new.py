"""``surgery new``: a spec to start from, or the file of a new method with its case file."""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

import surgery
from surgery.cli.command import FAULT, Argument, Command, Option
from surgery.cli.report import Report, cannot_write, result, write_file
from surgery.cli.scaffold import CASE, SPEC, TEMPLATES, WITHOUT, class_name
from surgery.core.catalogue import METHOD_VERBS, load
from surgery.core.diagnostics import fail


def spec(path: str, model: str, force: bool) -> list[Path]:
    """Writes a spec to start from. Raises S0913 when the file exists."""
    target = Path(path if path.endswith(".surg") else f"{path}.surg")
    text = SPEC.replace("MODEL", model.replace("\\", "\\\\").replace('"', '\\"')).replace("NAME", re.sub(r"[^\w.-]", "-", target.stem))
    _write(target, text, force)
    return [target]


def method(path: str, folder: Path, force: bool) -> list[Path]:
    """Writes ``passes/VERB/NAME.py`` and ``tests/cases/VERB_NAME.md`` below ``folder``.

    Raises S0911 for a name that cannot be a method's and S0913 when a file exists.
    """
    verb, slash, name = path.partition("/")
    if not slash or verb not in METHOD_VERBS:
        raise fail("S0911", f"surgery new method: `{path}` is not VERB/NAME", help=f"verbs: {', '.join(METHOD_VERBS)}", exit_code=FAULT)
    if verb not in TEMPLATES:
        why = WITHOUT.get(verb, f"this version has no kind for `{verb}`: no pass that a method of it could build on")
        raise fail(
            "S0911",
            f"there is no template for a method of `{verb}`",
            notes=[why],
            help=f"templates exist for {', '.join(v for v in METHOD_VERBS if v in TEMPLATES)}",
            exit_code=FAULT,
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise fail(
            "S0911",
            f"`{name}` cannot be a method's name",
            help="use lower case letters, digits and _, beginning with a letter",
            exit_code=FAULT,
        )
    if load().get(verb, name) is not None and not force:
        raise fail("S0913", f"the method `{verb} {name}` exists", help=f"`surgery explain {verb}/{name}` shows it", exit_code=FAULT)
    file = f"{name}_" if keyword.iskeyword(name) else name
    code = folder / "passes" / verb / f"{file}.py"
    if not (folder / "passes").is_dir():
        raise fail(
            "S0911",
            f"{folder} is not a checkout of model-surgery: it has no folder passes",
            help="run it in the checkout, or give --folder",
            exit_code=FAULT,
        )
    case = folder / "tests" / "cases" / f"{verb}_{name}.md"
    if not force:
        for target in (code, case):
            _absent(target)
    _write(code, TEMPLATES[verb].replace("CLASS", class_name(name)).replace("NAME", name), True)
    _write(case, CASE[verb].replace("NAME", name), True)
    return [code, case]


def _absent(target: Path) -> None:
    if target.exists():
        raise fail("S0913", f"{target} exists", help="choose another name, or --force replaces it", exit_code=FAULT)


def _write(target: Path, text: str, force: bool) -> None:
    if not force:
        _absent(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cannot_write(target, e) from e
    write_file(target, text)


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    if args.what == "spec":
        written = spec(args.name or "first.surg", args.model, args.force)
        hint = f"next: surgery check {written[0]}"
    elif args.what == "method":
        if not args.name:
            raise fail("S0911", "surgery new method: no name", help="write `surgery new method adapt/mine`", exit_code=FAULT)
        folder = Path(args.folder) if args.folder else Path(surgery.__file__).resolve().parent.parent
        written = method(args.name, folder, args.force)
        hint = (
            "next: write the mathematics, then `python -m surgery.dev generate` and `pytest tests -k " + args.name.replace("/", "_") + "`"
        )
    else:
        raise fail(
            "S0911",
            f"surgery new: `{args.what}` is neither spec nor method",
            help="write `surgery new spec` or `surgery new method VERB/NAME`",
            exit_code=FAULT,
        )
    if report.machine:
        report.document((), {"schema": "surgery.new/1", "files": [str(p) for p in written]})
    else:
        result("\n".join(str(p) for p in written))
        report.say(hint)
    return 0


COMMAND = Command(
    "new",
    "write a spec to start from, or the file of a new method",
    run,
    (
        Argument("what", "spec or method", files=False, words=("spec", "method")),
        Argument("name", "the file of the spec, or VERB/NAME of the method", "?"),
    ),
    (
        Option("model", "the model of the new spec", "MODEL", "minilm"),
        Option("folder", "checkout that gets the method (default: the one that this command runs from)", "DIR"),
        Option("force", "replace files that exist"),
    ),
    examples=("surgery new spec train.surg", "surgery new method adapt/mine"),
)
