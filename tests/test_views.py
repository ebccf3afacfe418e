"""The renderers: layout to the character, terminals that cannot be steered, and documents that others can read."""

from __future__ import annotations

import json
import random

from surgery.cli.views import github, sarif, text
from surgery.cli.views import json as json_view
from surgery.core.diagnostics import Diagnostic, Fix, Severity, error
from surgery.core.source import Source, Span

SPEC = """surg 1

convert moe(experts = 4)
  on layers[16..21].ffn
adapt lora(rank = 8)
  on layers[*].attn.{q, k, v, o}, layers[*].ffn.{up, down}
"""


def span(source: Source, piece: str) -> Span:
    at = source.text.index(piece)
    return Span(source, at, at + len(piece))


def sample() -> Diagnostic:
    source = Source("shrink.surg", SPEC)
    return error(
        "S0402", "these parts of the model no longer exist", span(source, "layers[*].ffn.{up, down}"),
        "selects `up` and `down` of 22 layers; 6 are gone",
        also=[(span(source, "convert"), "layers[16..21].ffn was replaced by experts here")],
        help="adapt the experts too: `layers[0..15].ffn.{up, down}, @moe_ffn.experts[*].{up, down}`",
    )  # fmt: skip


def test_layout() -> None:
    assert (
        text.render([sample()])
        == """\
error[S0402]: these parts of the model no longer exist
 --> shrink.surg:6:35
  |
6 |   on layers[*].attn.{q, k, v, o}, layers[*].ffn.{up, down}
  |                                   ^^^^^^^^^^^^^^^^^^^^^^^^ selects `up` and `down` of 22 layers; 6 are gone
  |
note: layers[16..21].ffn was replaced by experts here
 --> shrink.surg:3:1
help: adapt the experts too: `layers[0..15].ffn.{up, down}, @moe_ffn.experts[*].{up, down}`
  = surgery explain S0402
"""
    )


def test_gutter_is_as_wide_as_the_largest_number() -> None:
    source = Source("a.surg", "\n" * 99 + "x\n")
    shown = text.one(error("S0101", "m", span(source, "x"), "here")).splitlines()
    assert shown[1:5] == ["   --> a.surg:100:1", "    |", "100 | x", "    | ^ here"]


def test_a_span_of_many_lines() -> None:
    body = "".join(f"  line {i},\n" for i in range(1, 10))
    source = Source("a.surg", f"adapt lora(\n{body})\n")
    shown = text.one(error("S0101", "m", Span(source, 6, source.text.index(")") + 1), "all of it"))
    assert shown.splitlines()[1:-2] == [
        "  --> a.surg:1:7",
        "   |",
        " 1 | adapt lora(",
        "   |       ^^^^^",
        " 2 |   line 1,",
        "   |   ^^^^^^^",
        " 3 |   line 2,",
        "   |   ^^^^^^^",
        "...",
        "10 |   line 9,",
        "   |   ^^^^^^^",
        "11 | )",
        "   | ^ all of it",
    ]


def test_tabs_wide_and_combining_characters() -> None:
    source = Source("a.surg", "\tlet 名前 = e\u0301x y\n")
    shown = text.one(error("S0101", "m", span(source, "x"), "")).splitlines()
    line, marks = shown[3], shown[4]
    assert line == "1 |     let 名前 = e\u0301x y"
    assert marks.index("^") == 4 + len("    let ") + 4 + len(" = e")
    wide = text.one(error("S0101", "m", span(source, "名前"), "")).splitlines()[4]
    assert wide.count("^") == 4


def test_nothing_steers_the_terminal() -> None:
    evil = 'let a = "\x1b[31m\x07\u202e\ud800"'
    source = Source("a\x1b.surg", evil)
    shown = text.render(
        [error("S0101", "m \x1b[0m", Span(source, 4, 5), "l\x1b", notes=["n\x07"], help="h\x00", also=[(Span(source, 0, 3), "s\x1b")])]
    )
    assert not set(shown) & set("\x1b\x07\x00\u202e\ud800")


def test_a_long_line_is_cut_around_the_place() -> None:
    source = Source("a.surg", "x" * 5000 + "!" + "y" * 1_000_000)
    shown = text.one(error("S0101", "m", span(source, "!"), "here"))
    lines = shown.splitlines()
    assert max(map(len, lines)) < 200
    assert lines[3][lines[4].index("^")] == "!" and lines[3].endswith("…") and lines[3][4] == "…"


def test_empty_span_and_end_of_file() -> None:
    for body in ("", "surg 1", "surg 1\n"):
        source = Source("a.surg", body)
        shown = text.one(error("S0101", "m", Span(source, len(body), len(body) + 1), "here"))
        assert shown.count("^") == 1


def test_without_a_place_and_with_colour() -> None:
    bare = error("S0701", "no such checkpoint", notes=["one", "two\nlines"], help="look again")
    assert (
        text.one(bare) == "error[S0701]: no such checkpoint\nnote: one\nnote: two\n      lines\nhelp: look again\n  = surgery explain S0701"
    )
    coloured = text.one(sample(), color=True)
    assert coloured.startswith("\x1b[1;31merror[S0402]\x1b[0m") and coloured.count("\x1b[0m") == coloured.count("\x1b[1")
    assert text.summary([bare, bare, error("S0404", "w", severity=Severity.WARNING)]) == "2 errors, 1 warning"


def test_random_spans_never_fail_and_point_inside() -> None:
    rng = random.Random(1)
    letters = "ab \t\n\r名é\u0301\x00\u2028…"
    for _ in range(2000):
        body = "".join(rng.choice(letters) for _ in range(rng.randrange(60)))
        a = rng.randrange(len(body) + 1)
        b = rng.randrange(a, len(body) + 1)
        shown = text.one(error("S0101", "m", Span(Source("a", body), a, b), "here"))
        assert "^" in shown and "here" in shown


def test_json_is_the_documented_shape() -> None:
    d = json.loads(json_view.render([sample()]))
    assert d["schema"] == "surgery.diagnostics/1"
    (one,) = d["diagnostics"]
    assert list(one) == ["code", "severity", "message", "labels", "notes", "help", "fix"]
    assert one["labels"][0] == {
        "file": "shrink.surg", "line": 6, "column": 35, "end_line": 6, "end_column": 59,
        "text": "selects `up` and `down` of 22 layers; 6 are gone", "primary": True,
    }  # fmt: skip


def test_sarif_is_what_readers_need() -> None:
    source = Source("dir with space/a.surg", "adapt lorra on x\n")
    fixable = error("S0211", "no method", span(source, "lorra"), "here", fix=Fix(span(source, "lorra"), "lora"))
    doc = json.loads(sarif.render([sample(), fixable, error("S0901", "bare")], {"S0402": "gone"}))
    assert doc["version"] == "2.1.0" and doc["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = doc["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [r["id"] for r in rules] == ["S0211", "S0402", "S0901"] and rules[1]["shortDescription"]["text"] == "gone"
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] and result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
    first, second, third = run["results"]
    region = first["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 6, "startColumn": 35, "endLine": 6, "endColumn": 59}
    assert first["relatedLocations"][0]["physicalLocation"]["region"]["startLine"] == 3
    assert second["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "dir%20with%20space/a.surg"
    assert second["fixes"][0]["artifactChanges"][0]["replacements"][0]["insertedContent"]["text"] == "lora"
    assert third["locations"] == []


def test_github_escapes() -> None:
    source = Source("a,b:c.surg", "x\n")
    line = github.one(error("S0101", "100% wrong", span(source, "x"), "two\nlines"))
    assert line == "::error file=a%2Cb%3Ac.surg,line=1,endLine=1,col=1,endColumn=2,title=S0101::100%25 wrong%0Atwo%0Alines"
    assert github.one(error("S0404", "w", severity=Severity.WARNING)).startswith("::warning title=S0404::w")
