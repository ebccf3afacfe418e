"""``surgery fmt``: one layout for every spec, without options.

Works on tokens, so comments and blank lines (one at most) stay. The layout, in full:

* one statement a line, two spaces in front of it per stage; one space between words, around `=`, comparisons and `*`,
  behind `,` and `:`; none inside brackets; two in front of a comment that ends a line;
* a statement that does not fit in 110 columns breaks in front of its place, then in front of every clause, then its
  parameters go one a line with a comma behind the last, then its selectors go one a line;
* a statement with a comment inside keeps its own line breaks; only spaces and indentation change.

The result parses to the same tree, and formatting it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.core import ast
from surgery.core.diagnostics import Diagnostic
from surgery.core.source import Source
from surgery.core.units import plain
from surgery.grammar.lexer import Comment, Lexed, Token, lex
from surgery.grammar.parser import parse_lexed
from surgery.grammar.split import Piece, split
from surgery.grammar.words import CLAUSES, STATEMENT_SET

WIDTH = 110
INDENT = "  "

SharesOf = Callable[[str, str, str], bool]
"""(verb, method, parameter) -> whether the parameter is a share, so that a bare 0.3 is written 30%."""

_OPEN = frozenset("([{")
_CLOSE = frozenset(")]}")


def format_text(source: Source, shares: SharesOf | None = None) -> tuple[str, list[Diagnostic]]:
    """The canonical layout of a spec. A text with syntax errors comes back unchanged, with its diagnostics."""
    lexed = lex(source.text)
    file, problems = parse_lexed(source, lexed)
    if any(problem.is_error for problem in problems):
        return source.text, problems
    replaced = _share_literals(file, shares) if shares else {}
    return _Writer(source.text, lexed, replaced).write(), problems


# ---------------------------------------------------------------- shares


def _share_literals(file: ast.File, shares: SharesOf) -> dict[int, str]:
    """New text of bare numbers where a share is due, by their offset."""
    out: dict[int, str] = {}

    def value(node: ast.Node) -> None:
        if isinstance(node, ast.Number):
            if not node.unit and 0 <= node.value <= 1:
                out[node.span.start] = percent(node.value)
        elif isinstance(node, ast.ListValue):
            for item in node.items:
                value(item)
        elif isinstance(node, ast.Table):
            for entry in node.entries:
                value(entry.value)

    def visit(statements: tuple[ast.Statement, ...]) -> None:
        for node in statements:
            if isinstance(node, ast.Stage):
                visit(node.body)
                continue
            verb, call = _verb_and_call(node)
            for arg in call.args if call else ():
                if call and arg.name and shares(verb, call.name, arg.name):
                    value(arg.value)

    visit(file.statements)
    return out


def _verb_and_call(node: ast.Statement) -> tuple[str, ast.Call | None]:
    if isinstance(node, ast.Operation):
        return node.verb, node.method
    if isinstance(node, ast.Merge | ast.Train | ast.Measure):
        return type(node).__name__.lower(), node.method
    return "", None


def percent(value: int | float) -> str:
    """``0.3`` as ``30%``, exactly."""
    from decimal import Decimal

    text = format(Decimal(plain(value)) * 100, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


# ---------------------------------------------------------------- words of a statement


def _space(before: Token, token: Token) -> str:
    """What stands between two tokens of a line."""
    left, right = before[0], token[0]
    if right in (",", ":", "?", ".", "..", "(", ")", "]", "}") or left in (".", "@", "(", "[", "{"):
        return ""
    if left == "..":
        return " " if right == "NAME" else ""
    if right == "[":
        # An index is glued to its step; a list stands apart.
        return "" if left in ("NAME", "}", "*", "**") else " "
    return " "


class _Writer:
    def __init__(self, text: str, lexed: Lexed, replaced: dict[int, str]) -> None:
        self.text = text
        self.lexed = lexed
        self.replaced = replaced
        self.lines: list[str] = []
        self.comments = lexed.comments
        self.next_comment = 0

    def write(self) -> str:
        depth = 0
        previous_end = 0
        tokens = self.lexed.tokens
        for piece in split(self.lexed):
            previous_end = self._comments_before(tokens[piece.first], piece.first, depth, previous_end)
            if piece.kind == "close":
                depth -= 1
            indent = INDENT * depth
            blank = self._blank_before(previous_end, tokens[piece.first][2])
            if blank and piece.kind != "close":
                self._blank()
            self.lines += [(indent + line).rstrip() if line else "" for line in self._statement(piece, len(indent))]
            previous_end = tokens[piece.last - 1][3]
            if piece.kind == "open":
                depth += 1
        self._comments_before(None, len(tokens), depth, previous_end)
        while self.lines and not self.lines[-1]:
            self.lines.pop()
        return "".join(line + "\n" for line in self.lines)

    # ------------------------------------------------------------ comments and blank lines

    def _blank(self) -> None:
        if self.lines and self.lines[-1] and not self.lines[-1].endswith("{"):
            self.lines.append("")

    def _blank_before(self, start: int, end: int) -> bool:
        gap = self.text[start:end].replace("\r\n", "\n").replace("\r", "\n")
        return gap.count("\n") > 1

    def _comments_before(self, token: Token | None, at: int, depth: int, previous_end: int) -> int:
        """Writes the comments between two statements; returns the offset behind the last."""
        while self.next_comment < len(self.comments) and self.comments[self.next_comment].before <= at:
            comment = self.comments[self.next_comment]
            if token is not None and comment.start > token[2]:
                break
            self.next_comment += 1
            if not comment.own_line and self.lines:
                self.lines[-1] += "  " + comment.text
            else:
                if self._blank_before(previous_end, comment.start):
                    self._blank()
                self.lines.append(INDENT * depth + comment.text)
            previous_end = comment.end
        return previous_end

    # ------------------------------------------------------------ statements

    def _statement(self, piece: Piece, indent: int) -> list[str]:
        inner = self._inner_comments(piece)
        if inner:
            return self._keep_lines(piece, inner)
        tokens = self._tokens(piece)
        return layout(tokens, WIDTH - indent)

    def _inner_comments(self, piece: Piece) -> list[Comment]:
        found = []
        while self.next_comment < len(self.comments) and self.comments[self.next_comment].before < piece.last:
            found.append(self.comments[self.next_comment])
            self.next_comment += 1
        return found

    def _tokens(self, piece: Piece) -> list[Token]:
        out = []
        for token in self.lexed.tokens[piece.first : piece.last]:
            new = self.replaced.get(token[2])
            out.append((token[0], new, token[2], token[3]) if new else token)
        return out

    def _keep_lines(self, piece: Piece, comments: list[Comment]) -> list[str]:
        """A statement with comments inside: its line breaks stay, spaces and indentation are set."""
        tokens = self._tokens(piece)
        gaps = _gaps(tokens)
        by_token: dict[int, list[Comment]] = {}
        for comment in comments:
            by_token.setdefault(comment.before - piece.first, []).append(comment)
        lines: list[str] = []
        line = ""
        depth = 0
        fresh = True
        for i, token in enumerate(tokens):
            closing = token[0] in _CLOSE
            breaks = i > 0 and (piece.first + i) in self.lexed.line_first
            for comment in by_token.get(i, ()):
                breaks = True
                if comment.own_line:
                    if line:
                        lines.append(line)
                    line = ""
                    lines.append(INDENT * (1 + depth) + comment.text)
                else:
                    lines.append(line + "  " + comment.text)
                    line = ""
            if breaks and line:
                lines.append(line)
                line = ""
            fresh = not line
            if closing:
                depth -= 1
            if fresh:
                base = 0 if i == 0 else depth if closing else 1 + depth
                line = INDENT * base + token[1]
            else:
                line += gaps[i] + token[1]
            if token[0] in _OPEN:
                depth += 1
        lines.append(line)
        return lines


def _gaps(tokens: list[Token]) -> list[str]:
    """The space in front of each token when it stands in the same line as the one before."""
    gaps = [""]
    for i in range(1, len(tokens)):
        before, token = tokens[i - 1], tokens[i]
        gaps.append(_space(before, token))
    return gaps


# ---------------------------------------------------------------- layout


def layout(tokens: list[Token], width: int) -> list[str]:
    """The lines of one statement without inner comments."""
    tokens = _without_trailing_commas(tokens)
    whole = _join(tokens)
    if len(whole) <= width:
        return [whole]
    clauses = _clause_starts(tokens)
    head = tokens[: clauses[0]] if clauses else tokens
    first = _join(head)
    lines = [first] if len(first) <= width else _spread(head)
    if not clauses:
        return lines
    rest = _join(tokens[clauses[0] :])
    if len(INDENT + rest) <= width:
        return [*lines, INDENT + rest]
    for begin, end in zip(clauses, [*clauses[1:], len(tokens)], strict=True):
        lines += _clause_lines(tokens[begin:end], width)
    return lines


def _clause_lines(tokens: list[Token], width: int) -> list[str]:
    text = INDENT + _join(tokens)
    if len(text) <= width:
        return [text]
    members: list[list[Token]] = []
    for member in _members(tokens):
        # A line that consists of a statement keyword would start a statement: such a name stays in the line before.
        if members and member[0][1] in STATEMENT_SET and (len(member) < 2 or member[1][0] not in (".", "[", "?", ",")):
            members[-1] += member
        else:
            members.append(member)
    return [INDENT + _join(members[0]), *(INDENT * 2 + _join(member) for member in members[1:])]


def _spread(tokens: list[Token]) -> list[str]:
    """A head with its parameters one a line, or the head as it is when it has none."""
    opened = next((i for i, token in enumerate(tokens) if token[0] in _OPEN), None)
    if opened is None or tokens[-1][0] not in _CLOSE or _closing(tokens, opened) != len(tokens) - 1:
        return [_join(tokens)]
    members = _members(tokens[opened + 1 : -1])
    lines = [_join(tokens[: opened + 1])]
    for i, member in enumerate(members):
        comma = "," if i == len(members) - 1 else ""
        lines.append(INDENT + _join(member) + comma)
    return [*lines, tokens[-1][1]]


def _closing(tokens: list[Token], opened: int) -> int:
    depth = 0
    for i in range(opened, len(tokens)):
        if tokens[i][0] in _OPEN:
            depth += 1
        elif tokens[i][0] in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
    return len(tokens)


def _members(tokens: list[Token]) -> list[list[Token]]:
    """Runs of tokens up to and with each comma outside brackets."""
    members: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        members[-1].append(token)
        if token[0] in _OPEN:
            depth += 1
        elif token[0] in _CLOSE:
            depth -= 1
        elif token[0] == "," and depth == 0:
            members.append([])
    return [member for member in members if member]


def _without_trailing_commas(tokens: list[Token]) -> list[Token]:
    clauses = set(_clause_starts(tokens)) | {len(tokens)}
    out = []
    for i, token in enumerate(tokens):
        if token[0] == "," and (i + 1 in clauses or tokens[i + 1][0] in _CLOSE):
            continue
        out.append(token)
    return out


def _clause_starts(tokens: list[Token]) -> list[int]:
    """Where the clauses of a statement begin: keywords outside brackets in keyword position."""
    starts: list[int] = []
    depth = 0
    for i, token in enumerate(tokens):
        if token[0] in _OPEN:
            depth += 1
        elif token[0] in _CLOSE:
            depth -= 1
        elif depth == 0 and i >= 2 and token[0] == "NAME" and token[1] in CLAUSES and _is_clause(tokens, i, starts):
            starts.append(i)
    return starts


def _is_clause(tokens: list[Token], i: int, starts: list[int]) -> bool:
    """Whether the word is a keyword here, by the rule of the grammar: a name goes on with `.`, `[`, `,`, `?` or ends."""
    before = tokens[i - 1]
    if before[0] in (".", "=", "@", "*", "COMPARE") or (starts and starts[-1] == i - 1):
        return False
    if before[0] == "NAME" and before[1] == "own" and starts and starts[-1] == i - 2:
        return False
    if before[0] == ",":
        return i + 1 < len(tokens) and tokens[i + 1][0] not in (".", "[", ",", "?")
    return True


def _join(tokens: list[Token]) -> str:
    gaps = _gaps(tokens)
    return "".join(gap + token[1] for gap, token in zip(gaps, tokens, strict=True))
