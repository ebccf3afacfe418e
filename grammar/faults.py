"""Syntax errors by situation: what to say about a statement that does not parse.

A situation is what the parser would have accepted, the token it met instead, and the token before. `SITUATIONS`
is the ordered table of those that have a message of their own (situations.py); each has examples in tests/test_grammar_faults.py and a
page in docs/errors. Whatever no row knows is S0101 with what was expected.
"""

from __future__ import annotations

from surgery.core.diagnostics import Diagnostic, Fix, error
from surgery.core.source import Span
from surgery.grammar.lexer import FAULTS, Token
from surgery.grammar.situations import SITUATIONS, arithmetic, quoted
from surgery.grammar.split import MAX_BRACKETS, MAX_STAGES
from surgery.grammar.stuck import OPENERS, Situation, expectation
from surgery.grammar.words import CLAUSES, STATEMENTS, near

# ---------------------------------------------------------------- unknown statements


def unknown_statement(s: Situation) -> tuple[Diagnostic, bool]:
    """The diagnostic of a piece that begins with no statement keyword, and whether it looks like no spec at all."""
    first = s.tokens[0]
    span = s.span(first)
    if first[0] in FAULTS:
        return _lexical(s, first), True
    if first[0] != "NAME":
        shown = first[1] if len(first[1]) <= 30 else first[1][:27] + "..."
        if first[0] in (")", "]", "}"):
            return error("S0109", f"`{shown}` closes nothing", span, "no open bracket before it", help="remove it"), True
        return error("S0106", f"a statement cannot begin with `{shown}`", span, "a keyword is due here", help=_keyword_help()), True
    word = first[1]
    offers = near(word, STATEMENTS)
    shown = word if len(word) <= 30 else word[:27] + "..."
    if word in CLAUSES:
        return error(
            "S0126",
            f"`{word}` belongs to a statement, and there is none before it",
            span,
            "a clause cannot stand alone",
            help=_keyword_help(),
        ), False
    helps = [f"did you mean {' or '.join(f'`{name}`' for name in offers)}?"] if offers else [_keyword_help()]
    fix = Fix(span, offers[0], safe=False) if offers else None
    return error("S0106", f"there is no statement `{shown}`", span, "unknown keyword", help=helps, fix=fix), not offers


def _keyword_help() -> str:
    return f"statements begin with {', '.join(STATEMENTS[:-1])} or {STATEMENTS[-1]}"


# ---------------------------------------------------------------- explanations


def explain(s: Situation) -> Diagnostic:
    """The one diagnostic of a broken statement."""
    problem = s.piece.brackets
    if problem and problem[0] == "deep":
        token = s.lexed.tokens[problem[1]]
        stage = s.keyword == "stage" and token[0] == "{"
        what = f"stages nest deeper than {MAX_STAGES}" if stage else f"brackets nest deeper than {MAX_BRACKETS}"
        return error("S0127", what, s.span(token), "too deep", help="flatten it; no method needs such nesting")
    for token in s.tokens:
        if token[0] in FAULTS:
            return _lexical(s, token)
    if problem:
        return _brackets(s, *problem)
    for situation in SITUATIONS:
        found = situation(s)
        if found is not None:
            return found
    expected = expectation(s.accepts)
    return error("S0101", f"{s.shown} cannot stand here", s.gap, f"expected {expected}")


def _lexical(s: Situation, token: Token) -> Diagnostic:
    kind, text, start, _ = token
    span = s.span(token)
    if kind == "BAD_STRING":
        return error("S0116", "this string is never closed", span, "a string ends on the line on which it begins", help='close it with `"`')
    if kind == "BAD_QUOTES":
        fix = None
        if len(text) > 1 and text.endswith("'") and not set(text) & {'"', "\\"}:
            fix = Fix(span, f'"{text[1:-1]}"')
        return error(
            "S0118", "strings stand in double quotes", span, "single quotes", help=f'write `"{text.strip(chr(39))[:40]}"`', fix=fix
        )
    if kind == "BAD_DOTS":
        return error(
            "S0123", "a range has two dots", span, f"{len(text)} dots", help="write `[0..11]`; both ends are included", fix=Fix(span, "..")
        )
    if kind in ("BAD_COMPARE", "BAD_ARROW"):
        right = {"=<": "<=", "=>": ">=", "<>": "!=", "≤": "<=", "≥": ">=", "≠": "!=", ":=": "=", "->": "to"}[text]
        return error("S0134", f"there is no `{text}`", span, "unknown sign", help=f"write `{right}`", fix=Fix(span, right))
    if text[0] == "%":
        return error("S0119", "a unit stands right behind its number", span, "away from its number", help="write `30%` without a space")
    if text[0] in "+-/^~\\" and s.keyword in ("model", "import", "emit") and "(" not in s.source.text[s.tokens[0][2] : start]:
        at = next((i for i, t in enumerate(s.tokens) if i and t[1] != "to" and (s.keyword != "emit" or s.tokens[i - 1][1] == "to")), 1)
        return quoted(s, at)
    if text[0] == "-" and s.source.text[start - 1 : start].isalnum() and s.source.text[span.end : span.end + 1].isalnum():
        return error(
            "S0115", "a name cannot contain `-`", span, "not in a name", help="write `_` instead; arithmetic is not part of the language"
        )
    if text[0] in "+-/^":
        return arithmetic(span)
    if text[0] == ";":
        return error(
            "S0121",
            "`;` is no part of the language",
            span,
            "not needed",
            help="a statement ends where the next one begins, on a new line",
            fix=Fix(span, ""),
        )
    if text[0] == "\\":
        return error(
            "S0121",
            "`\\` is no part of the language",
            span,
            "not needed",
            help="a statement may simply go on in the next line",
            fix=Fix(span, ""),
        )
    first = text[0]
    name = f"`{first}`" if first.isprintable() else f"the character U+{ord(first):04X}"
    helps = {"\0": "the file is not plain text", "\u00a0": "replace the no-break space by a plain one"}.get(first, "remove it")
    return error("S0121", f"{name} is no part of the language", Span(s.source, start, start + 1), "stray character", help=helps)


def _brackets(s: Situation, what: str, at: int, other: int) -> Diagnostic:
    token = s.lexed.tokens[at]
    if what == "unmatched":
        return error(
            "S0109", f"`{token[1]}` closes nothing", s.span(token), "no open bracket before it", help="remove it, or open the bracket"
        )
    close = OPENERS[token[1]]
    if other < s.piece.last:
        wrong = s.lexed.tokens[other]
        return error(
            "S0109", f"`{wrong[1]}` does not close `{token[1]}`", s.span(wrong), f"`{close}` is due here",
            also=[(s.span(token), "opened here")], help=f"close it with `{close}`",
        )  # fmt: skip
    return error("S0108", f"this `{token[1]}` is never closed", s.span(token), "opened here", help=f"close it with `{close}`")
