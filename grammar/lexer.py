"""Text to tokens, in one pass and one regular expression.

The words of the language are all of kind ``NAME`` here; whether one is a keyword is decided by the parser from what the
grammar expects at that place. What is no token of the language (an unterminated string, a stray character) becomes a
token too, of a kind in :data:`FAULTS`, so that nothing is lost and nothing raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypeAlias

Token: TypeAlias = tuple[str, str, int, int]
"""(kind, text, start, end): the kind of punctuation is its own text, other kinds are the grammar's terminals."""

FAULTS = frozenset({"BAD_STRING", "BAD_QUOTES", "BAD_DOTS", "BAD_COMPARE", "BAD_ARROW", "BAD"})

# The order matters: longer forms first. A comparison or an arrow that the language does not have is one token, so that
# the message can name the right one.
_PATTERN = re.compile(
    r"""
    (?P<SPACE>[ \t\f]+)
  | (?P<NEWLINE>[\r\n][ \t\f\r\n]*)
  | (?P<COMMENT>\#[^\r\n]*)
  | (?P<NAME>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<DECIMAL>-?[0-9]+(?:\.[0-9]+(?:[eE][+-]?[0-9]+|[A-Za-z_][A-Za-z0-9_]*|%)?|[eE][+-]?[0-9]+|[A-Za-z_][A-Za-z0-9_]*|%))
  | (?P<INT>-?[0-9]+)
  | (?P<STRING>"[^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*")
  | (?P<BAD_STRING>"[^\r\n]*)
  | (?P<BAD_QUOTES>'[^'\r\n]*'?)
  | (?P<BAD_DOTS>\.{3,})
  | (?P<BAD_COMPARE>=<|<>|≤|≥|≠)
  | (?P<BAD_ARROW>=>|->|:=)
  | (?P<COMPARE><=|>=|==|!=|<|>)
  | (?P<PUNCTUATION>\.\.|\*\*|[(){}\[\],.:=*?@])
  | (?P<BAD>[^\sA-Za-z0-9_"'\#(){}\[\],.:=*?@<>]+|.)
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


@dataclass
class Comment:
    """A comment; ``before`` is the index of the token that follows it, ``own_line`` that it starts its line."""

    start: int
    end: int
    text: str
    before: int
    own_line: bool


@dataclass
class Lexed:
    """The tokens of a text, which of them start a line, and its comments."""

    tokens: list[Token] = field(default_factory=list)
    line_first: set[int] = field(default_factory=set)
    comments: list[Comment] = field(default_factory=list)


def lex(text: str) -> Lexed:
    """All tokens of ``text``. Never raises; linear in its length."""
    out = Lexed()
    tokens, line_first, comments = out.tokens, out.line_first, out.comments
    append = tokens.append
    first = True
    start_at = 1 if text.startswith("\ufeff") else 0
    for match in _PATTERN.finditer(text, start_at):
        kind = match.lastgroup
        if kind == "SPACE":
            continue
        if kind == "NEWLINE":
            first = True
            continue
        start, end = match.span()
        lexeme = match.group()
        if kind == "COMMENT":
            comments.append(Comment(start, end, lexeme.rstrip(), len(tokens), first))
            continue
        if first:
            line_first.add(len(tokens))
            first = False
        append((lexeme if kind == "PUNCTUATION" else kind, lexeme, start, end))  # type: ignore[arg-type]
    return out
