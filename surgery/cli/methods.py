"""``surgery methods``: what a spec can call."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from surgery.cli.command import FAULT, Argument, Command
from surgery.cli.explaining import absent
from surgery.cli.report import Report, result
from surgery.core.catalogue import BACKENDS, CHECKS, METHOD_VERBS, QUANTITIES, SOURCES, Entry, Quantity, load
from surgery.core.diagnostics import fail
from surgery.core.near import suggestion

SECTIONS: tuple[tuple[str, dict[str, Entry] | dict[str, Quantity]], ...] = (
    ("emit", BACKENDS),
    ("expect", {**CHECKS}),
    ("expect, compared", QUANTITIES),
    ("data", SOURCES),
)

NOT_YET = " (not yet in this version)"


def listing(verb: str = "") -> str:
    """The methods of one verb or everything."""
    catalogue = load()
    lines: list[str] = []
    width = max([len(n) for _, n in catalogue.methods] + [14])
    for word in METHOD_VERBS:
        names = catalogue.names(word)
        if (verb and word != verb) or not names:
            continue
        lines.append(word)
        lines += [f"  {n:<{width}}  {catalogue.methods[word, n].summary}" for n in names]
        lines.append("")
    if not verb:
        gone = absent()
        for title, table in SECTIONS:
            lines.append(title)
            lines += [f"  {e.name:<{width}}  {e.summary}" + (NOT_YET if title == "emit" and e.name in gone else "") for e in table.values()]
            lines.append("")
        if empty := [word for word in METHOD_VERBS if not catalogue.names(word)]:
            lines += [f"no method yet in this version: {', '.join(empty)}", ""]
        lines.append("`surgery explain NAME` shows the page of one.")
    return "\n".join(lines).rstrip() + "\n"


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    if args.verb and args.verb not in METHOD_VERBS:
        help, notes = suggestion(args.verb, METHOD_VERBS, "verbs")
        raise fail("S0912", f"there is no verb `{args.verb}`", help=help, notes=notes, exit_code=FAULT)
    if report.machine:
        found = [asdict(m) for (v, _), m in load().methods.items() if not args.verb or v == args.verb]
        report.document((), {"schema": "surgery.methods/1", "methods": found})
    elif args.verb and not load().names(args.verb):
        report.say(f"this version has no method for `{args.verb}` yet")
    else:
        result(listing(args.verb or ""))
    return 0


COMMAND = Command(
    "methods",
    "list the methods, outputs, checks, quantities and data sources",
    run,
    (Argument("verb", "only the methods of this verb", "?", files=False, words=METHOD_VERBS),),
    examples=("surgery methods", "surgery methods adapt"),
)
