"""``surgery explain``: the page of a diagnostic's code, of a method, of a backend, check, quantity, data source or fusion rule; with
``--why-not`` what fused in an emitted file and what did not."""

from __future__ import annotations

import argparse
import re

from surgery.cli.command import FAULT, Argument, Command, Option
from surgery.cli.explaining import absent, pages
from surgery.cli.pages import entry_page, method_page, quantity_page
from surgery.cli.report import Report, result
from surgery.cli.why_not import known_rules, rule_page, why_not
from surgery.core.catalogue import BACKENDS, CHECKS, METHOD_VERBS, QUANTITIES, SOURCES, load
from surgery.core.diagnostics import fail
from surgery.core.near import suggestion

TABLES = ((BACKENDS, "emit"), (CHECKS, "expect"), (SOURCES, "data"))


def page(subject: str) -> str:
    """The Markdown page of a code, ``VERB/NAME`` or a name. Raises S0912 when there is none."""
    subject = subject.strip()
    if re.fullmatch(r"[Ss]\d{1,4}", subject):
        return _code(subject.upper())
    catalogue = load()
    verb, slash, name = subject.replace(" ", "/").partition("/")
    if slash:
        info = catalogue.get(verb, name)
        if info is not None:
            return method_page(info)
    else:
        found = [method_page(catalogue.methods[v, subject]) for v in catalogue.verbs_of(subject)]
        found += [entry_page(table[subject], word) for table, word in TABLES if subject in table]
        if subject in absent():
            found.append("This version cannot emit it yet.\n")
        if subject in QUANTITIES:
            found.append(quantity_page(QUANTITIES[subject]))
        if subject in METHOD_VERBS:
            found.append(_verb(subject))
        if subject in known_rules():
            found.append(rule_page(subject))
        if found:
            return "\n".join(found)
    names = [f"{v}/{n}" for v, n in catalogue.methods] if slash else [n for _, n in catalogue.methods]
    if not slash:
        names += [*BACKENDS, *CHECKS, *QUANTITIES, *SOURCES, *known_rules()]
    help, _ = suggestion(subject, names, "names")
    raise fail(
        "S0912",
        f"there is no page `{subject}`",
        help=[*help, "`surgery methods` lists the methods; codes look like S0212"],
        exit_code=FAULT,
    )


def _verb(verb: str) -> str:
    """The methods that a verb has."""
    catalogue = load()
    lines = [f"- `{verb} {n}`: {catalogue.methods[verb, n].summary}" for n in catalogue.names(verb)]
    return "\n".join([f"# {verb}", "", *(lines or ["This version has no method for this verb yet."])]) + "\n"


def _code(code: str) -> str:
    known = pages()
    if code in known:
        return known[code]
    help, _ = suggestion(code, known, "codes")
    raise fail(
        "S0912", f"there is no page for the code `{code}`", help=help or "the codes are listed in docs/errors/README.md", exit_code=FAULT
    )


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    if args.why_not:
        text, found = why_not(args.subject)
        if report.machine:
            report.document((), found)
        else:
            result(text)
        return 0
    text = page(" ".join(args.subject))
    if report.machine:
        report.document((), {"schema": "surgery.page/1", "subject": " ".join(args.subject), "markdown": text})
    else:
        result(text)
    return 0


COMMAND = Command(
    "explain",
    "explain a diagnostic's code, a method or a fusion rule",
    run,
    (
        Argument(
            "subject",
            "a code such as S0212, a verb, a method such as lora or adapt/lora, an output, check, quantity, data source or fusion rule; with "
            "`--why-not` a file that `emit onnx` or `emit pt2` wrote, and before it a rule",
            "+",
            files=False,
        ),
    ),
    (Option("why-not", "say where a fusion rule fired in an emitted file, and for each near miss the first condition that failed"),),
    examples=(
        "surgery explain S0212",
        "surgery explain lora",
        "surgery explain adapt/lora",
        "surgery explain onnx",
        "surgery explain --why-not skip_layer_norm model.onnx",
        "surgery explain --why-not model.onnx",
    ),
)
