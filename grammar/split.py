"""Cuts the tokens of a spec into statements, so that one broken statement leaves the others whole.

A statement starts where a line starts with a statement keyword, or right behind the brace that opens a stage. Since no
word is reserved, such a word can also be a name in the middle of a statement (`on` new line `model.layers`); the token
behind it tells. All of this is one pass without recursion, however deep the braces nest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgery.grammar.lexer import FAULTS, Lexed, Token
from surgery.grammar.words import CLAUSE_SET, STATEMENT_SET

MAX_BRACKETS = 64
MAX_STAGES = 16

_OPEN = {"(": ")", "[": "]", "{": "}"}
_CLOSE = {")": "(", "]": "[", "}": "{"}
_COMPLETE = frozenset({")", "]", "}", "STRING", "INT", "DECIMAL", "?"}) | FAULTS
_CONTINUES = frozenset({"(", "[", ".", ",", "=", "COMPARE", "?", "*", "{", ":", "..", "**"})
_NAME_GOES_ON = frozenset({".", "[", "?", ","})


@dataclass(frozen=True)
class Piece:
    """Tokens ``[first, last)`` of one statement.

    ``kind`` is ``statement``, ``open`` (the head of a stage), ``close`` (its brace) or ``end`` (a stage still open at the
    end of the text: ``first`` is its opening brace). ``brackets`` is the first problem with brackets inside, as
    (what, token, token of the other bracket): what is ``unclosed``, ``unmatched`` or ``deep``.
    """

    kind: str
    first: int
    last: int
    brackets: tuple[str, int, int] | None = None


def split(lexed: Lexed) -> Iterator[Piece]:
    """The pieces of a text in order. Linear; keeps every token in exactly one piece."""
    tokens, line_first = lexed.tokens, lexed.line_first
    stages: list[int] = []
    begin = 0
    stack: list[int] = []
    problem: tuple[str, int, int] | None = None
    fresh = True

    def finish(kind: str, end: int) -> Piece:
        nonlocal begin, problem, fresh
        broken = problem or (("unclosed", stack[-1], end) if stack else None)
        piece = Piece(kind, begin, end, broken)
        begin, problem, fresh = end, None, True
        stack.clear()
        return piece

    for at, token in enumerate(tokens):
        kind = token[0]
        if not fresh and at in line_first and (_inside_start(lexed, at) if stack else _starts(lexed, at, begin)):
            yield finish("statement", at)
        if kind == "}" and stages and (not stack or (at in line_first and all(tokens[i][0] != "{" for i in stack))):
            if not fresh:
                yield finish("statement", at)
            stages.pop()
            yield finish("close", at + 1)
            continue
        if fresh:
            begin, fresh = at, False
        if kind in _OPEN:
            if kind == "{" and not stack and tokens[begin][1] == "stage" and at - begin <= 2:
                if len(stages) >= MAX_STAGES:
                    problem = ("deep", at, at)
                    yield finish("statement", len(tokens))
                    return
                stages.append(at)
                yield finish("open", at + 1)
                continue
            if len(stack) >= MAX_BRACKETS:
                problem = problem or ("deep", at, at)
            else:
                stack.append(at)
        elif kind in _CLOSE and not (problem and problem[0] == "deep"):
            if stack and tokens[stack[-1]][0] == _CLOSE[kind]:
                stack.pop()
            elif problem is None:
                problem = ("unclosed", stack[-1], at) if stack else ("unmatched", at, at)
    if not fresh:
        yield finish("statement", len(tokens))
    for opened in reversed(stages):
        yield Piece("end", opened, opened + 1)


def _starts(lexed: Lexed, at: int, begin: int) -> bool:
    """Whether the first token of a line, outside all brackets, starts a new statement."""
    tokens = lexed.tokens
    kind, word = tokens[at][:2]
    before = tokens[at - 1]
    demands = _demands(tokens, at - 1, begin)
    if kind == "NAME":
        after = tokens[at + 1][0] if at + 1 < len(tokens) else ""
        if word in STATEMENT_SET:
            return not (demands and after in _NAME_GOES_ON)
        if word in CLAUSE_SET:
            return False
        # A misspelt keyword: no statement goes on with a plain word once something complete stands before it.
        return not demands or (before[0] == "," and after == "NAME" and tokens[at + 1][1] not in CLAUSE_SET)
    return kind not in _CONTINUES and not demands


def _demands(tokens: list[Token], at: int, begin: int) -> bool:
    """Whether something must follow the token ``at`` in the statement that starts at ``begin``."""
    kind, word = tokens[at][:2]
    if kind != "NAME":
        return kind not in _COMPLETE
    if at - begin < 2:
        # The keyword of the statement demands its name; the name may look like any clause.
        return at == begin
    return word in CLAUSE_SET and tokens[at - 1][0] not in (".", "=", "@") and tokens[at - 1][1] != "as"


def _inside_start(lexed: Lexed, at: int) -> bool:
    """Whether the first token of a line starts a new statement although a bracket is still open.

    Inside brackets a word is never followed by another word, a string or a number, so a keyword that is shows that
    the bracket was forgotten.
    """
    tokens = lexed.tokens
    return (
        tokens[at][0] == "NAME"
        and tokens[at][1] in STATEMENT_SET
        and at + 1 < len(tokens)
        and at + 1 not in lexed.line_first
        and tokens[at + 1][0] in ("NAME", "STRING", "INT")
    )


def docs(lexed: Lexed) -> dict[int, str]:
    """The text of the `##` lines in front of each token that starts a statement, by token."""
    found: dict[int, list[str]] = {}
    for comment in lexed.comments:
        text = comment.text
        if comment.own_line and text.startswith("##") and not text.startswith("###"):
            line = text[2:]
            found.setdefault(comment.before, []).append(line[1:] if line[:1] == " " else line)
    return {at: "\n".join(lines) for at, lines in found.items()}
