"""What a verb is: a table of its arguments and options, from which the parser, the help, the completion and docs/cli.md are made.

Built on argparse: it imports in a few milliseconds, where typer with rich takes more than a quarter of the time that
``surgery check`` may take in all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from surgery.core.diagnostics import fail

FINE, FINDINGS, FAULT = 0, 1, 2
FORMATS = ("text", "json", "sarif", "github")


@dataclass(frozen=True)
class Argument:
    """A positional argument. ``count`` is ``1``, ``?`` (may be left out) or ``+`` (one or more). ``files`` says what completion offers."""

    name: str
    help: str
    count: str = "1"
    files: bool = True
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """``--name``; without a ``value`` name it is a switch. ``many`` collects repeated uses into a list."""

    name: str
    help: str
    value: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    many: bool = False
    short: str = ""

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Command:
    """One verb. ``run`` gets the parsed arguments and gives the exit code."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    description: str = ""
    examples: tuple[str, ...] = ()
    reports: bool = True

    @property
    def all_options(self) -> tuple[Option, ...]:
        return (*self.options, *((FORMAT, DENY) if self.reports else ()), QUIET, COLOR)


FORMAT = Option("format", "how results and diagnostics are written", "FORMAT", "text", FORMATS)
DENY = Option("deny", "treat warnings as errors", "KIND", None, ("warnings",))
QUIET = Option("quiet", "print results and diagnostics only, no progress and no summary", short="q")
COLOR = Option("color", "colours: on a terminal, always, never (NO_COLOR is honoured)", "WHEN", "auto", ("auto", "always", "never"))
SET = Option("set", "give a parameter of the spec another value", "NAME=VALUE", many=True)
NO_CACHE = Option("no-cache", "do not use the cache of captured models")
ALLOW_CODE = Option("allow-code", "allow models of the form python:package.module:factory, which run their code")
MODEL = Argument("model", "a checkpoint folder, a hub name, config:PATH, an artifact, python:module:factory or minilm", "?")


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are diagnostics."""

    def error(self, message: str) -> NoReturn:
        raise fail("S0911", f"{self.prog}: {message}", help=f"`{self.prog} --help` shows what there is", exit_code=FAULT)


@dataclass
class Formatter:
    """Help with the width of the terminal, at most 110 columns."""

    width: int = field(default=100)

    def __call__(self, prog: str) -> argparse.RawDescriptionHelpFormatter:
        import shutil

        width = min(110, shutil.get_terminal_size((self.width, 24)).columns)
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


def parser_for(command: Command) -> Parser:
    """The argparse parser of one verb."""
    text = command.description or command.summary[0].upper() + command.summary[1:] + "."
    epilog = "examples:\n" + "\n".join(f"  {e}" for e in command.examples) if command.examples else None
    parser = Parser(f"surgery {command.name}", description=text, epilog=epilog, formatter_class=Formatter(), allow_abbrev=False)
    for argument in command.arguments:
        count = None if argument.count == "1" else argument.count
        parser.add_argument(argument.name, help=argument.help, nargs=count, metavar=argument.name.upper())  # type: ignore[arg-type]
    for option in command.all_options:
        flags = [f"--{option.name}", *([f"-{option.short}"] if option.short else [])]
        if not option.value:
            parser.add_argument(*flags, action="store_true", help=option.help)
        elif option.many:
            parser.add_argument(*flags, action="append", default=[], metavar=option.value, help=option.help)
        else:
            more = f" ({'|'.join(option.choices)})" if option.choices else ""
            given = {"choices": option.choices} if option.choices else {}
            parser.add_argument(*flags, default=option.default, metavar=option.value, help=option.help + more, **given)  # type: ignore[arg-type]
    return parser


def parse_sets(texts: Sequence[str]) -> dict[str, str]:
    """``["r=16"]`` as a dict. Raises S0911 for one without ``=`` and for a name given twice."""
    out: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise fail("S0911", f"`--set {text}` is not NAME=VALUE", help="write `--set r=16`", exit_code=FAULT)
        if name.strip() in out:
            raise fail("S0911", f"`{name.strip()}` is set twice", help="keep one `--set` for each parameter", exit_code=FAULT)
        out[name.strip()] = value.strip()
    return out
