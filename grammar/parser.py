"""Text to syntax tree, statement by statement, with every syntax error of the file in one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from surgery.core import ast
from surgery.core.diagnostics import Diagnostic, Fix, Severity, error, fail
from surgery.core.source import Source, Span
from surgery.grammar.build import Builder
from surgery.grammar.lalr import Machine, Stuck, tables
from surgery.grammar.lexer import Lexed, lex
from surgery.grammar.split import Piece, docs, split
from surgery.grammar.words import EDITIONS, STATEMENT_SET, near

MAX_REPORTED = 50
"""Syntax errors shown of one file; a file with more is hardly a spec."""


def read_source(path: str | Path) -> Source:
    """The text of a file in UTF-8 (a byte order mark is allowed).

    Raises :class:`SurgeryError` with exit code 2: S0140 when the file is missing or a folder, S0141 when it cannot be
    read, S0142 when it is not UTF-8.
    """
    name = str(path)
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise fail("S0140", f"there is no file `{name}`", exit_code=2, help=_similar_files(Path(path))) from None
    except IsADirectoryError:
        raise fail("S0140", f"`{name}` is a folder, not a spec", exit_code=2, help="name a .surg file in it") from None
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise fail("S0141", f"cannot read `{name}`: {why.lower()}", exit_code=2, help="check the path and its permissions") from None
    return decode(raw, name)


def decode(raw: bytes, name: str) -> Source:
    """The source of bytes that were read from ``name``; raises S0142, at the first wrong byte, when they are not UTF-8 text."""
    try:
        return Source(name, raw.decode("utf-8"))
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        column = fault.start - (raw.rfind(b"\n", 0, fault.start) + 1) + 1
        helps = "save the file as UTF-8"
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            helps = "the file looks like UTF-16: save it as UTF-8"
        readable = raw[: fault.start].decode("utf-8")
        source = Source(name, readable + "\ufffd")  # what can be shown of the file: all in front of the byte, and a sign for it
        raise fail(
            "S0142", f"`{name}` is not UTF-8 text: byte 0x{raw[fault.start]:02x} in line {line}, byte {column}",
            Span(source, len(readable), len(readable) + 1), "this byte", exit_code=2, help=helps,
        ) from None  # fmt: skip


def _similar_files(path: Path) -> tuple[str, ...]:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix == ".surg")
    except (OSError, ValueError):
        return ("check the path",)
    offers = near(path.name, names)
    return (f"did you mean {' or '.join(f'`{path.parent / name}`' for name in offers)}?",) if offers else ("check the path",)


def parse(source: Source) -> tuple[ast.File, list[Diagnostic]]:
    """The tree of all sound statements, and one S01 diagnostic or more for each broken one. Never raises; linear time."""
    return parse_lexed(source, lex(source.text))


def parse_lexed(source: Source, lexed: Lexed) -> tuple[ast.File, list[Diagnostic]]:
    """:func:`parse` for tokens that are at hand."""
    return _Parser(source, lexed).parse()


class _Parser:
    def __init__(self, source: Source, lexed: Lexed) -> None:
        self.source = source
        self.lexed = lexed
        self.builder = Builder(source)
        self.machine = Machine(self.builder, tables())
        self.found: list[Diagnostic] = []
        self.broken_names: list[str] = []
        self.in_junk = False

    def parse(self) -> tuple[ast.File, list[Diagnostic]]:
        texts = docs(self.lexed)
        tokens = self.lexed.tokens
        body: list[ast.Statement] = []
        open_stages: list[tuple[ast.Stage | None, list[ast.Statement]]] = []
        for piece in split(self.lexed):
            if piece.kind == "end":
                self._unclosed_stage(piece.first)
            if piece.kind in ("close", "end"):
                head, outer = open_stages.pop()
                if head is not None:
                    end = tokens[piece.first][3] if piece.kind == "close" else len(self.source.text)
                    span = Span(self.source, head.span.start, end)
                    outer.append(dataclasses.replace(head, body=tuple(body), span=span))
                else:
                    outer.extend(body)
                body = outer
                continue
            node = self._piece(piece)
            if node is not None and piece.first in texts:
                node = dataclasses.replace(node, doc=texts[piece.first])
            if piece.kind == "open":
                open_stages.append((node, body))  # type: ignore[arg-type]
                body = []
            elif node is not None:
                if open_stages and isinstance(node, ast.Edition):
                    self._edition_in_stage(node)
                else:
                    body.append(node)
        while open_stages:
            # Only when the nesting was too deep to go on.
            head, outer = open_stages.pop()
            body = outer + ([dataclasses.replace(head, body=tuple(body))] if head is not None else body)
        self._check_edition(body)
        file = ast.File(tuple(body), tuple(self.broken_names), span=Span(self.source, 0, len(self.source.text)))
        return file, self._reported()

    # ------------------------------------------------------------ one statement

    def _piece(self, piece: Piece) -> ast.Statement | None:
        """The node of a piece, or None with at least one diagnostic (or inside a run of lines already reported)."""
        tokens = self.lexed.tokens[piece.first : piece.last]
        is_statement = tokens[0][1] in STATEMENT_SET and tokens[0][0] == "NAME"
        result: Any = None
        if piece.brackets is None and is_statement:
            result = self.machine.run("stage_head" if piece.kind == "open" else "simple", tokens)
            if not isinstance(result, Stuck):
                if not self.builder.problems:
                    self.in_junk = False
                    return result
                self.found += self.builder.problems
                self.builder.problems.clear()
                self._break(piece)
                return None
            self.builder.problems.clear()
        from surgery.grammar import faults, stuck  # only broken specs pay for it

        situation = stuck.Situation(self.source, self.lexed, piece, tokens, result)
        if not is_statement:
            found, junk = faults.unknown_statement(situation)
            if junk and self.in_junk:
                return None
            self.in_junk = junk
            self.found.append(found)
            return None
        self.in_junk = False
        self.found.append(faults.explain(situation))
        self._break(piece)
        return None

    def _break(self, piece: Piece) -> None:
        """Notes the names that a broken statement would have declared."""
        tokens = self.lexed.tokens
        words = tokens[piece.first : min(piece.last, piece.first + 2)]
        if len(words) == 2 and words[0][1] in ("param", "let", "data", "adapter", "checkpoint") and words[1][0] == "NAME":
            self.broken_names.append(words[1][1])
        for at in range(piece.first + 1, piece.last - 1):
            if tokens[at][1] == "as" and tokens[at + 1][0] == "NAME":
                self.broken_names.append(tokens[at + 1][1])

    def _unclosed_stage(self, brace: int) -> None:
        token = self.lexed.tokens[brace]
        self.found.append(
            error(
                "S0108",
                "this stage is never closed",
                Span(self.source, token[2], token[3]),
                "opened here",
                help="close it with `}` on a line of its own",
            )
        )

    # ------------------------------------------------------------ the edition

    def _edition_in_stage(self, node: ast.Edition) -> None:
        self.found.append(
            error("S0104", "the edition stands inside a stage", node.span, "not here", help="move `surg 1` to the first line of the file")
        )

    def _check_edition(self, body: list[ast.Statement]) -> None:
        known = ", ".join(f"`surg {number}`" for number in EDITIONS)
        editions = [node for node in body if isinstance(node, ast.Edition)]
        if not editions:
            tokens = self.lexed.tokens
            if any(token[1] == "surg" and at in self.lexed.line_first for at, token in enumerate(tokens)):
                return  # a broken edition line was reported already
            start = tokens[0][2] if tokens else 0
            fix = Fix(Span(self.source, start, start), f"surg {EDITIONS[-1]}\n\n")
            end = tokens[0][3] if tokens else 0
            self.found.append(
                error(
                    "S0102", "the spec does not say which edition of the language it is written in", Span(self.source, start, end),
                    "the edition comes before everything else", help=f"make `surg {EDITIONS[-1]}` the first line", fix=fix,
                )
            )  # fmt: skip
            return
        first = editions[0]
        if first.number not in EDITIONS:
            newer = first.number > max(EDITIONS)
            help = "update surgery to read this spec" if newer else f"write {known}; `surgery fix` rewrites older specs"
            self.found.append(error("S0103", f"edition {first.number} is not known", first.span, f"this version reads {known}", help=help))
        if body[0] is not first:
            self.found.append(
                error(
                    "S0104", "the edition is not the first statement", first.span, "comes too late",
                    also=[(body[0].span, "stands before it")], help=f"move `surg {first.number}` to the first line",
                )
            )  # fmt: skip
        for again in editions[1:]:
            self.found.append(
                error(
                    "S0105",
                    "the edition is given twice",
                    again.span,
                    "second time",
                    also=[(first.span, "first time")],
                    help="remove one of the two lines",
                )
            )

    def _reported(self) -> list[Diagnostic]:
        """All findings in the order of the text, cut to a readable number."""
        found = sorted(self.found, key=lambda d: d.span.start)
        if len(found) <= MAX_REPORTED:
            return found
        rest = len(found) - MAX_REPORTED
        found = found[:MAX_REPORTED]
        found.append(
            error(
                "S0130", f"{rest} more syntax errors are not shown", found[-1].span, "the last one shown",
                help="correct the first ones and check again", severity=Severity.ERROR,
            )
        )  # fmt: skip
        return found
