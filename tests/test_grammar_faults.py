"""Syntax errors by example: each broken statement gives exactly one diagnostic, with the code that fits it."""

from __future__ import annotations

import pytest

from surgery.core import ast
from surgery.core.source import Source
from surgery.grammar.parser import MAX_REPORTED, parse

EXAMPLES: dict[str, list[str]] = {
    "S0101": ["stage a b {\n}", "expect params <= 3 of all"],
    "S0106": ["adpat lora on x", "123", "\"text\"", "hello there"],
    "S0107": ['model "m" fold lora on x', 'param r = 8 emit torch to "x"'],
    "S0108": ["adapt lora(rank = 8 on layers[*]", "let x = [1, 2", "fold x on layers[*", "stage a {"],
    "S0109": ["fold lora) on x", "let x = [1, 2)", "let x = f(a = {1: 2)}", ")"],
    "S0110": ["adapt lora(rank = 8 alpha = 16) on x", "let x = [1 2]", "fold x on layers.{q v}", "fold x on a \"b\"", "let x = {0: 4 1: 8}"],
    "S0111": ["adapt lora(rank = ) on x", "param r =", "expect params <=", "expect same_output within", "let x = {0: , 1: 2}", "adapt lora(rank = , b = 2) on x"],
    "S0112": ["adapt lora(rank = 8) on", "fold x on a using b keep", "insert b after", "fold x on a except ,"],
    "S0113": ["adapt lora(rank = 8) at layers[*]", "adapt lora layers[*].attn", "insert x(a = 1) behind layers"],
    "S0114": ["emit torch", 'emit torch(a = 1) "x"', "emit onnx dir"],
    "S0115": ["param", "let = 5", 'model "x" as', "fold x on a as 5", 'import "x.surg"', "let x = a.5b", "fold x on a as moe-ffn"],
    "S0116": ['model "abc', 'emit torch to "x\nfold y on z'],
    "S0117": [r'model "C:\models"', r'model "\u12"', r'model "\ud800"', r'model "\u0000"'],
    "S0118": ["model 'abc'", "emit torch to 'x"],
    "S0119": ["let x = .5", "let x = 5.", "let x = 1_000", "let x = 30 %", "let x = " + "1" * 41, "let x = 1e999", "fold x on layers[" + "1" * 13 + "]", "let x = 1.2.3"],
    "S0120": ["let x = 5q", "let x = 30percent", "let x = 2gib", "let x = 3K"],
    "S0121": ['model "x";', "fold x on a !", "fold x\0 on a", "fold x on a \\\n  as b", "let x = \u00a05", 'model "a\0b"'],
    "S0122": ["fold x on layers[]", "fold x on layers.{}", "let x = []", "let x = {}", "let x = [1,,2]", "fold x(, a = 1) on y"],
    "S0123": ["fold x on layers[..5]", "fold x on layers[1...3]", "fold x on layers[1..2..3]", "fold x on layers..attn", "fold x on layers[0..b]"],
    "S0124": ["adapt lora(rank = 8, rank = 16) on x"],
    "S0125": ["fold x on a on b", "fold x on a using c using d", "fold x on a after b", "expect params on a <= 3 on b"],
    "S0126": ["train lisa using text", "fold x on a usng text"],
    "S0127": ["let x = " + "[" * 70 + "1" + "]" * 70],
    "S0128": ["adapt lora(rank = 8, 16) on x"],
    "S0129": ["adapt lora(rank 8) on x", "adapt lora(rank: 8) on x", "let x 8", "data t lines"],
    "S0131": ["model minilm", "emit torch to build/x", "import x.surg as y", "model"],
    "S0133": ["adapt", "adapt (rank = 8) on x", "emit", "fold \"x\""],
    "S0134": ["expect params = 3", "expect params 3", "expect params on a", "expect params =< 3", "expect params => 3", "adapt lora(rank == 8) on x", "let x := 3", "expect params ≤ 3"],
    "S0135": ["fold x on layers[1.5]", "fold x on layers[a]", "fold x on layers[0..5 by 0]", "let x = {a: 4}", "fold x on layers[3k]"],
    "S0136": ["merge ties(density = 40%) on x"],
    "S0137": ["fold x on layers?.attn", "fold x on layers.{q?, v}"],
    "S0138": ['model "x" "y"', "surg 1 1", "param r = 8 = 9", "let x = ramp(4, 16).a", "param r = 8 16"],
    "S0139": ["let x = [4 * 2]", "adapt lora(rank = r + 1) on x", "let x = 8 / 2", "adapt lora(rank = 4 -2) on x"],
}  # fmt: skip


@pytest.mark.parametrize(("code", "text"), [(code, text) for code, texts in EXAMPLES.items() for text in texts])
def test_each_broken_statement_is_explained_once(code: str, text: str) -> None:
    file, problems = parse(Source("x.surg", f'surg 1\nparam before\n{text}\nemit report to "after"\n'))
    assert [p.code for p in problems] == [code] or (len(set(p.code for p in problems)) == 1 and problems[0].code == code), [
        (p.code, p.message) for p in problems
    ]
    kept = [type(s) for s in file.statements]
    assert kept[:2] == [ast.Edition, ast.Param]
    assert ast.Emit in [*kept, *(type(s) for st in file.statements if isinstance(st, ast.Stage) for s in st.body)]


def codes(text: str) -> list[str]:
    return [p.code for p in parse(Source("x.surg", text))[1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["S0102"]),
        ('model "x"\n', ["S0102"]),
        ("surg 2\n", ["S0103"]),
        ("surg one\n", ["S0103"]),
        ("surg\n", ["S0103"]),
        ("on layers[*]\nsurg 1\n", ["S0126"]),
        ('model "x"\nsurg 1\n', ["S0104"]),
        ("surg 1\nsurg 1\n", ["S0105"]),
        ("surg 1\nstage a {\n  surg 1\n}\n", ["S0104"]),
        ("surg 1\nstage a {\n" * 1 + "stage b {\n" * 20, ["S0127"]),
        ("\ufeffsurg 1\r\nfold x\ton\r\n\tlayers\r\n", []),
    ],
)
def test_editions_and_stages(text: str, expected: list[str]) -> None:
    assert codes(text) == expected


def test_every_error_of_a_file_is_reported_in_order() -> None:
    found = parse(Source("x.surg", "surg 1\nadapt lora(rank = ) on x\nfold a on b\nmodel minilm\nlet x = 5q\n"))
    assert [(p.code, p.span.line) for p in found[1]] == [("S0111", 2), ("S0131", 4), ("S0120", 5)]
    assert len(found[0].statements) == 2
    assert found[0].broken_names == ("x",)


def test_a_file_of_errors_is_cut_short() -> None:
    found = codes("surg 1\n" + "fold x on\n" * 500)
    assert len(found) == MAX_REPORTED + 1 and found[-1] == "S0130"


def test_prose_is_one_error_not_one_a_line() -> None:
    assert codes("surg 1\n" + "The quick brown fox, it said; jumps.\n\n" * 1000)[:1] == ["S0106"]
    assert len(codes("surg 1\n" + "The quick brown fox.\n" * 1000)) == 1


def test_fixes_make_the_statement_parse() -> None:
    for text in ("let x = 30percent", "let x = .5", "fold x on layers[1...3]", "model 'abc'", "expect params =< 3", "adapt lora(rank: 8) on x",
                 "adapt lora(rank = 8 alpha = 16) on x", 'model "m" fold lora on x', 'model "x";', "adapt lora layers[*].attn", "mesure loss on x", "emit torch to build/x-1", "model ../m"):  # fmt: skip
        whole = f"surg 1\n{text}\n"
        (problem,) = parse(Source("x", whole))[1]
        assert problem.fix is not None, text
        span = problem.fix.span
        fixed = whole[: span.start] + problem.fix.replacement + whole[span.end :]
        assert codes(fixed) == [], fixed
