"""Laws of the front end over generated trees and texts."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.core import ast
from surgery.core.astjson import from_json, to_json
from surgery.core.printer import to_text
from surgery.core.source import Source
from surgery.grammar.formatter import format_text
from surgery.grammar.lexer import lex
from surgery.grammar.parser import parse
from tests.surg_strategies import files, soup

relaxed = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def read(text: str) -> ast.File:
    file, problems = parse(Source("x.surg", text))
    assert not problems, [(p.code, p.message, str(p.span), text) for p in problems]
    return file


@relaxed
@given(files)
def test_a_printed_tree_reads_back_as_itself(tree: ast.File) -> None:
    assert read(to_text(tree)) == tree


@relaxed
@given(files)
def test_a_tree_survives_json(tree: ast.File) -> None:
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree


def _scatter(text: str, choices: list[int]) -> str:
    """The same tokens with comments, blank lines, line ends and spaces in between, where they mean nothing."""
    tokens = lex(text).tokens
    first = lex(text).line_first
    out = []
    at = 0
    for i, token in enumerate(tokens):
        gap = text[at : token[2]]
        choice = choices[i % len(choices)]
        if i in first:
            gap += ["", "\n\n\n", "# note\n", "  # own\n\n", "\r\n\t"][choice % 5]
        elif token[0] in (")", "]", "}", ",", "=", "(") and tokens[i - 1][1] != "stage":
            gap += ["", " ", "  # inside\n  ", "\n", "\t"][choice % 5]
        out.append(gap + token[1])
        at = token[3]
    return "".join(out) + text[at:] + "# last"


@relaxed
@given(files, st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_formatting_keeps_the_tree_and_the_comments_and_is_idempotent(tree: ast.File, choices: list[int]) -> None:
    text = _scatter(to_text(tree), choices)
    source = Source("x.surg", text)
    before, problems = parse(source)
    assert not problems, [(p.code, p.message, str(p.span), text) for p in problems]
    formatted, problems = format_text(source)
    assert not problems
    assert read(formatted) == before, formatted
    assert [c.text for c in lex(formatted).comments] == [c.text for c in lex(text).comments]
    assert format_text(Source("x.surg", formatted))[0] == formatted
    assert "\n\n\n" not in formatted and "\t" not in _outside_strings(formatted) and "\r" not in formatted


def _outside_strings(text: str) -> str:
    return "".join(t[1] for t in lex(text).tokens if t[0] != "STRING")


@relaxed
@given(st.one_of(st.text(max_size=200), soup, st.binary(max_size=100).map(lambda b: b.decode("latin-1"))))
def test_any_text_is_read_or_reported(text: str) -> None:
    source = Source("x.surg", text)
    file, problems = parse(source)
    assert isinstance(file, ast.File)
    for problem in problems:
        assert problem.code.startswith("S01") and len(problem.code) == 5
        assert 0 <= problem.span.start <= problem.span.end <= len(text)
        assert problem.message and not problem.message.endswith(".")
    formatted, again = format_text(source)
    assert [p.code for p in again] == [p.code for p in problems]
    if problems:
        assert formatted == text
    else:
        assert read(formatted) == file


@relaxed
@given(soup)
def test_a_sound_statement_survives_whatever_stands_before_it(text: str) -> None:
    good = 'emit report to "out"\n'
    file, _ = parse(Source("x.surg", text.replace("{", "(") + "\n\n" + good))
    assert any(isinstance(s, ast.Emit) and s.to == "out" for s in file.statements)
