"""Where a statement did not parse: what the parser would have accepted, the token it met, the tokens around it."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.core.source import Source, Span
from surgery.grammar.lalr import END, Stuck
from surgery.grammar.lexer import Lexed, Token
from surgery.grammar.split import Piece
from surgery.grammar.words import CLAUSES

OPENERS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Situation:
    """A piece that did not parse; ``stuck`` is None when it was not tried (brackets, unknown keyword)."""

    source: Source
    lexed: Lexed
    piece: Piece
    tokens: list[Token]
    stuck: Stuck | None

    @property
    def at(self) -> int:
        return self.stuck.at if self.stuck else 0

    @property
    def accepts(self) -> frozenset[str]:
        return self.stuck.accepts if self.stuck else frozenset()

    @property
    def here(self) -> Token:
        """The token at which the parser stuck; of kind ``$END`` when the statement ends too early."""
        if self.at < len(self.tokens):
            return self.tokens[self.at]
        end = self.tokens[-1][3]
        return (END, "", end, end)

    @property
    def before(self) -> Token:
        return self.tokens[self.at - 1]

    @property
    def after(self) -> Token | None:
        return self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None

    @property
    def keyword(self) -> str:
        return self.tokens[0][1]

    @property
    def ended(self) -> bool:
        return self.here[0] == END

    def span(self, token: Token) -> Span:
        return Span(self.source, token[2], token[3])

    @property
    def gap(self) -> Span:
        """Where something is missing: just behind the token before, one character wide."""
        end = self.before[3]
        return Span(self.source, end, min(end + 1, len(self.source.text))) if self.ended else self.span(self.here)

    @property
    def shown(self) -> str:
        """The token found, as messages show it."""
        text = self.here[1]
        return "the end of the statement" if self.ended else f"`{text if len(text) <= 30 else text[:27] + '...'}`"

    @property
    def open_bracket(self) -> str:
        """The innermost bracket that is open here, or empty."""
        stack = []
        for token in self.tokens[: self.at]:
            if token[0] in OPENERS:
                stack.append(token[0])
            elif token[0] in (")", "]", "}") and stack:
                stack.pop()
        return stack[-1] if stack else ""


def expectation(accepts: frozenset[str]) -> str:
    """What could stand here, in words: ``a value or `)```."""
    left = set(accepts)
    out: list[str] = []
    if {"INT", "DECIMAL", "STRING"} <= left:
        out.append("a value")
        left -= {"INT", "DECIMAL", "STRING", "NAME", "[", "{", "@", "*", "**"}
    elif {"@", "STRING", "{"} <= left:
        out.append("a selector")
        left -= {"@", "STRING", "{", "NAME", "*", "**"}
    words = {
        "INT": "a whole number",
        "DECIMAL": "a number",
        "STRING": "a string",
        "NAME": "a name",
        "COMPARE": "a comparison",
        END: "the end of the statement",
    }
    out += [words[kind] for kind in words if kind in left]
    out += [
        f"`{text}`"
        for text in sorted(left)
        if text not in words and not text.isupper() and (text in CLAUSES or not text[0].isalpha() or text in ("by", "base", "own"))
    ]
    if not out:
        return "something else"
    return out[0] if len(out) == 1 else ", ".join(out[:-1]) + " or " + out[-1]
