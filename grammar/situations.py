"""The table of situations in which a statement does not parse that have a message of their own."""

from __future__ import annotations

from collections.abc import Callable

from surgery.core.diagnostics import Diagnostic, Fix, error
from surgery.core.source import Span
from surgery.grammar.lalr import END
from surgery.grammar.stuck import Situation, expectation
from surgery.grammar.words import CLAUSES, PLACES, STATEMENT_SET, VERBS, near

_VALUES = frozenset({"INT", "DECIMAL", "STRING", "NAME"})
_PREPOSITIONS = frozenset({"at", "in", "into", "onto", "over", "under", "behind", "to", "from", "with", "around", "inside", "where"})


def arithmetic(span: Span) -> Diagnostic:
    return error(
        "S0139",
        "the language has no arithmetic",
        span,
        "an operator",
        help="write the result, or build the spec from Python where it must be computed",
    )


# ---------------------------------------------------------------- the table


def _joined(s: Situation) -> Diagnostic | None:
    if s.here[0] == "NAME" and s.here[1] in STATEMENT_SET and END in s.accepts and s.after and s.after[0] in _VALUES:
        return error(
            "S0107", f"`{s.here[1]}` begins a statement in the middle of a line", s.span(s.here), "a new statement",
            help="start every statement on a line of its own", fix=Fix(Span(s.source, s.before[3], s.here[2]), "\n"),
        )  # fmt: skip
    return None


def _dots(s: Situation) -> Diagnostic | None:
    if ".." not in (s.here[0], s.before[0]) or s.open_bracket == "(":
        return None
    if s.here[0] == ".." and s.before[0] == "[":
        return error(
            "S0123", "a range begins with a number", s.span(s.here), "no number before it", help="write `[0..5]` for the first six"
        )
    if s.here[0] == ".." and not s.open_bracket:
        return error(
            "S0123",
            "`..` stands only in an index",
            s.span(s.here),
            "two dots",
            help="separate steps with one dot: `layers[*].attn`; ranges stand in brackets: `[0..5]`",
        )
    if s.here[0] == "..":
        return error(
            "S0123",
            "a range has two ends",
            s.span(s.here),
            "a third end",
            help="write `[0..10 by 2]` for a step, `[0..3, 8..11]` for two ranges",
        )
    return error(
        "S0123",
        "the end of the range is not a whole number",
        s.gap,
        "a whole number is due here",
        help="write `[0..5]`, or `[6..]` for all from the seventh on",
    )


def _empty(s: Situation) -> Diagnostic | None:
    pair = s.before[0] + s.here[0]
    if pair in ("[]", "{}"):
        span = s.span(s.before).to(s.span(s.here))
        index = s.at >= 2 and s.tokens[s.at - 2][0] in ("NAME", "}", "*", "**") and pair == "[]"
        helps = "write `[*]` for all" if index else "name at least one member, or leave it out"
        return error("S0122", f"`{pair}` is empty", span, "nothing inside", help=helps)
    if s.here[0] == "," and s.before[0] in ("(", "[", "{", ","):
        return error(
            "S0122", "a comma with nothing before it", s.span(s.here), "one comma too many", help="remove it", fix=Fix(s.span(s.here), "")
        )
    return None


def _index(s: Situation) -> Diagnostic | None:
    if "INT" in s.accepts and "NAME" not in s.accepts and s.keyword != "surg":
        what = "a key of a table" if ":" in s.accepts or s.open_bracket == "{" else "an index"
        return error(
            "S0135",
            f"{what} is a whole number",
            s.gap,
            f"not {s.shown}",
            help="write `[3]`, `[0, 5]`, `[0..11]`, `[6..]`, `[0..10 by 2]`, `[-1]` or `[*]`",
        )
    if s.here[0] == ":" and s.open_bracket == "{":
        return error(
            "S0135", "a table goes by layer numbers", s.gap, "what stands before it is no layer number", help="write `{0..3: 4, 4..11: 8}`"
        )
    return None


def _edition(s: Situation) -> Diagnostic | None:
    if s.keyword == "surg" and s.at == 1:
        return error("S0103", f"{s.shown} is no edition", s.gap, "a whole number is due here", help="write `surg 1`")
    return None


def _number(s: Situation) -> Diagnostic | None:
    digits = ("INT", "DECIMAL")
    if s.here[0] == "." and s.after and s.after[0] in digits and "INT" in s.accepts:
        span = s.span(s.here).to(s.span(s.after))
        return error(
            "S0119",
            f"`{span.text}` is no number",
            span,
            "a digit is due before the point",
            help=f"write `0{span.text}`",
            fix=Fix(span, "0" + span.text),
        )
    if s.here[0] == "." and s.before[0] in digits:
        span = s.span(s.before).to(s.span(s.here))
        return error("S0119", f"`{span.text}` is no number", span, "a digit is due behind the point", help=f"write `{s.before[1]}`")
    return None


def _operator(s: Situation) -> Diagnostic | None:
    value_before = s.before[0] in ("INT", "DECIMAL", "NAME", ")")
    if s.here[0] == "*" and value_before and s.open_bracket and s.at > 1:
        return arithmetic(s.span(s.here))
    if s.before[0] in ("INT", "DECIMAL") and s.here[0] in ("INT", "DECIMAL") and s.here[1].startswith("-"):
        return arithmetic(s.span(s.here))
    return None


def _optional(s: Situation) -> Diagnostic | None:
    if s.here[0] == "?" or (s.before[0] == "?" and s.here[0] in (".", "[", "?")):
        mark = s.here if s.here[0] == "?" else s.before
        return error(
            "S0137",
            "`?` marks a whole selector",
            s.span(mark),
            "not at the end of a selector",
            help="put it at the end: `layers[*].ffn.{up, gate}?`",
        )
    return None


def _equals(s: Situation) -> Diagnostic | None:
    name = s.before[1]
    if "=" in s.accepts and s.before[0] == "NAME" and not s.ended and "COMPARE" not in s.accepts:
        if (s.here[0] in _VALUES and s.here[1] not in CLAUSES) or s.here[0] in (":", "COMPARE", "[", "{"):
            fix = Fix(s.span(s.here), " =") if s.here[0] == ":" else None
            return error("S0129", f"no `=` between `{name}` and its value", s.gap, "`=` is due here", help=f"write `{name} = ...`", fix=fix)
    if s.accepts == {"="}:
        return error("S0129", f"no `=` behind `{name}`", s.gap, "`=` is due here", help=f"write `{s.keyword} {name} = ...`")
    return None


def _comparison(s: Situation) -> Diagnostic | None:
    if "COMPARE" in s.accepts and s.here[1] not in CLAUSES:
        if s.here[0] == "=":
            return error(
                "S0134", "`=` compares nothing", s.span(s.here), "not a comparison", help="write `==`, `<=`, `>=`, `<`, `>` or `!=`"
            )
        if s.ended or s.here[0] in ("INT", "DECIMAL"):
            return error(
                "S0134",
                f"no comparison before {s.shown}",
                s.gap,
                "a comparison is due here",
                help="write `<=`, `>=`, `==`, `<`, `>` or `!=`",
            )
    if s.here[0] == "COMPARE" and s.here[1] == "==" and "=" in s.accepts:
        return error(
            "S0134",
            "`==` compares; a value is given with `=`",
            s.span(s.here),
            "a comparison",
            help="write `=`",
            fix=Fix(s.span(s.here), "="),
        )
    return None


def _method(s: Situation) -> Diagnostic | None:
    if s.accepts != {"NAME"} or s.at != 1 or s.keyword not in (*VERBS, "merge", "train", "expect", "measure", "emit"):
        return None
    kind = {"emit": "backend", "expect": "quantity or check", "measure": "metric"}.get(s.keyword, "method")
    return error(
        "S0133",
        f"`{s.keyword}` names no {kind}",
        s.gap,
        f"the name of a {kind} is due here",
        help=f"`surgery methods` lists what `{s.keyword}` knows",
    )


def _name(s: Situation) -> Diagnostic | None:
    if s.before[0] != "." and s.accepts != {"NAME"}:
        return None
    helps = "a name is made of letters, digits and `_`, and does not begin with a digit"
    if s.before[0] == ".":
        return error("S0115", f"no name behind the dot, but {s.shown}", s.gap, "a name is due here", help=helps)
    return error("S0115", f"`{s.before[1]}` is followed by no name", s.gap, f"a name is due here, not {s.shown}", help=helps)


def _string(s: Situation) -> Diagnostic | None:
    return quoted(s, s.at) if s.accepts == {"STRING"} else None


def quoted(s: Situation, at: int) -> Diagnostic:
    """A string is due at a token; the help shows the words there in quotes when they look like what was meant."""
    word = s.tokens[at - 1][1]
    if at >= len(s.tokens):
        return error(
            "S0131", f"`{word}` is followed by no string", s.gap, "a string in double quotes is due here", help=f'write `{word} "..."`'
        )
    end = at + 1
    while end < len(s.tokens) and s.tokens[end][2] == s.tokens[end - 1][3]:
        end += 1
    span = s.span(s.tokens[at]).to(s.span(s.tokens[end - 1]))
    text = span.text
    if set(text) & set('"\\\r\n'):
        return error(
            "S0131", f"`{word}` is followed by no string", span, "a string in double quotes is due here", help=f'write `{word} "..."`'
        )
    return error(
        "S0131",
        f"`{word}` is followed by no string",
        span,
        "a string in double quotes is due here",
        help=f'write `{word} "{text[:60]}"`',
        fix=Fix(span, f'"{text}"'),
    )


def _target(s: Situation) -> Diagnostic | None:
    if not {"@", "STRING", "{"} <= s.accepts or "INT" in s.accepts:
        return None
    word = s.before[1]
    return error(
        "S0112",
        f"`{word}` is followed by no selector",
        s.gap,
        f"a selector is due here, not {s.shown}",
        help=f"say which parts: `{word} layers[*].attn.{{q, v}}`",
    )


def _value(s: Situation) -> Diagnostic | None:
    if not {"INT", "DECIMAL", "STRING", "NAME"} <= s.accepts:
        return None
    if s.before[0] in ("=", ":", "COMPARE") or s.before[1] == "within":
        return error(
            "S0111",
            f"no value behind `{s.before[1]}`",
            s.gap,
            f"a value is due here, not {s.shown}",
            help="write a number, a name, a string, a list or a table",
        )
    return None


def _comma_or_clause(s: Situation) -> Diagnostic | None:
    starts = s.here[0] in _VALUES or s.here[0] in ("@", "{", "*", "**", "[")
    if not starts:
        return None
    word = s.here[1]
    if s.open_bracket:
        if "," in s.accepts:
            return error(
                "S0110",
                f"no comma before {s.shown}",
                s.span(s.here),
                "a comma is due before this",
                help="separate members with commas",
                fix=Fix(Span(s.source, s.before[3], s.before[3]), ","),
            )
        return None
    if s.here[0] == "NAME" and END in s.accepts:
        if word in CLAUSES:
            return error(
                "S0126",
                f"`{word}` does not belong to `{s.keyword}` here",
                s.span(s.here),
                "this clause cannot stand here",
                help=f"expected {expectation(s.accepts)}",
            )
        offers = near(word, [c for c in CLAUSES if c in s.accepts])
        followed = s.after is not None and s.after[0] in ("NAME", "STRING", "@", "{")
        if "after" in s.accepts and (word in _PREPOSITIONS or (offers and offers[0] in PLACES)):
            return _place(s, followed)
        if offers and followed:
            return error(
                "S0126",
                f"there is no clause `{word}`",
                s.span(s.here),
                "unknown clause",
                help=f"did you mean `{offers[0]}`?",
                fix=Fix(s.span(s.here), offers[0], safe=False),
            )
        if "on" in s.accepts and "," not in s.accepts and "." not in s.accepts:
            return _place(s, followed)
    if "," in s.accepts:
        return error(
            "S0110",
            f"no comma before {s.shown}",
            s.span(s.here),
            "a comma is due before this",
            help="separate selectors with commas",
            fix=Fix(Span(s.source, s.before[3], s.before[3]), ","),
        )
    return None


def _place(s: Situation, followed: bool) -> Diagnostic:
    known = [place for place in PLACES if place in s.accepts]
    words = " ".join(f"`{place}`" for place in known)
    if followed:
        return error("S0113", f"`{s.here[1]}` is no place", s.span(s.here), "unknown place word", help=f"say where with {words}")
    return error(
        "S0113",
        f"no place word before {s.shown}",
        s.span(s.here),
        "where?",
        help=f"say where with {words}",
        fix=Fix(Span(s.source, s.here[2], s.here[2]), "on ", safe=False),
    )


def _to(s: Situation) -> Diagnostic | None:
    if s.keyword == "emit" and "to" in s.accepts:
        return error(
            "S0114",
            "the emission does not say where to",
            s.gap,
            f'`to "path"` is due here, not {s.shown}',
            help=f'write `emit {s.tokens[1][1]} to "build/out"`',
        )
    if s.keyword == "import" and s.accepts == {"as"}:
        return error("S0115", "the import has no name", s.gap, "`as name` is due here", help=f"write `import {s.tokens[1][1]} as name`")
    return None


def _leftover(s: Situation) -> Diagnostic | None:
    if END in s.accepts and s.here[0] != "NAME":
        return error(
            "S0138",
            f"{s.shown} stands behind the end of the statement",
            s.gap,
            "nothing can follow but " + expectation(s.accepts - {END}) if s.accepts - {END} else "the statement is complete before it",
            help="remove it",
        )
    return None


SITUATIONS: tuple[Callable[[Situation], Diagnostic | None], ...] = (
    _joined, _edition, _number, _dots, _empty, _operator, _optional, _index, _comparison, _equals, _method, _name, _string,
    _target, _value, _to, _comma_or_clause, _leftover,
)  # fmt: skip
"""The table: the first row that knows the situation speaks."""
