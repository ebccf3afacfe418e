"""The grammar, its generated tables, and what the trees of edition 1 look like."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery.core import ast, units
from surgery.core.diagnostics import SurgeryError
from surgery.core.printer import to_text
from surgery.core.source import Source
from surgery.grammar.generate import grammar_parser, render
from surgery.grammar.parser import parse, read_source

ROOT = Path(__file__).parent.parent
LANGUAGE = (ROOT / "docs/language.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```surg\n(.*?)^```", LANGUAGE, re.S | re.M)


def read(text: str) -> ast.File:
    file, problems = parse(Source("x.surg", text))
    assert not problems, [(p.code, p.message, str(p.span)) for p in problems]
    return file


def one(text: str) -> ast.Statement:
    return read("surg 1\n" + text).statements[1]


def whole(snippet: str) -> str:
    return snippet if snippet.startswith("surg ") else "surg 1\n" + snippet


def test_the_committed_tables_are_what_the_grammar_gives() -> None:
    for path, content in render().items():
        assert (ROOT / path).read_text(encoding="utf-8") == content, "run python -m surgery.grammar.generate"


def test_the_grammar_is_strict_lalr() -> None:
    pytest.importorskip("interegular")
    grammar_parser(strict=True)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_of_the_language_page_parses_here_and_in_lark(number: int) -> None:
    text = whole(SNIPPETS[number])
    tree = grammar_parser().parse(text, start="file")
    assert len(tree.children) == len(read(text).statements)
    assert read(to_text(read(text))) == read(text)


def test_the_language_page_has_snippets() -> None:
    assert len(SNIPPETS) >= 10


def test_an_operation_with_everything() -> None:
    node = one('## doc\n## more\nadapt lora(rank = {0..3: 4, 4..11: r}, f(2), drop = 5%) on layers[0, 2..8 by 2, -1].{attn.q, ffn}[*]?, "a.*.b", @moe.x\n'
               "  keep layers[3..] keep own norm, b using c.text except a as new".replace("rank = {0..3: 4, 4..11: r}, f(2)", "f(2), rank = {0..3: 4, 4..11: r}"))  # fmt: skip
    r = ast.Range
    assert node == ast.Operation(
        "adapt",
        ast.Call("lora", (
            ast.Arg("", ast.Call("f", (ast.Arg("", ast.Number(2)),))),
            ast.Arg("rank", ast.Table((ast.TableEntry(r(0, 3), ast.Number(4)), ast.TableEntry(r(4, 11), ast.Name("r"))))),
            ast.Arg("drop", ast.Number(0.05, "%")),
        )),
        "on",
        (
            ast.Selector((
                ast.Step("layers", ast.Index((r(0, 0), r(2, 8, 2), r(-1, -1)))),
                ast.SetStep(((ast.Step("attn"), ast.Step("q")), (ast.Step("ffn"),)), ast.Index()),
            ), optional=True),
            ast.Selector(raw="a.*.b"),
            ast.Selector((ast.Step("x"),), ref="moe"),
        ),
        "c.text", (ast.Selector((ast.Step("layers", ast.Index((r(3, None),))),)),), ("norm", "b"), (ast.Selector((ast.Step("a"),)),), "new",
        doc="doc\nmore",
    )  # fmt: skip


def test_spans_cover_what_they_name() -> None:
    text = "surg 1\nadapt lora(rank = 8) on layers[*].attn\n  using text\n"
    node = read(text).statements[1]
    assert isinstance(node, ast.Operation)
    assert node.span.text == text[7:-1] and node.verb_span.text == "adapt" and node.using_span.text == "text"
    assert node.method.span.text == "lora(rank = 8)" and node.method.name_span.text == "lora"
    assert node.method.args[0].name_span.text == "rank" and node.method.args[0].value.span.text == "8"
    assert node.selectors[0].span.text == "layers[*].attn" and node.selectors[0].steps[0].span.text == "layers[*]"


def test_values_and_selectors_of_let() -> None:
    assert one("let x = calib.text").value == ast.Name("calib.text")  # type: ignore[attr-defined]
    assert isinstance(one("let x = layers[6..]").value, ast.Selector)  # type: ignore[attr-defined]
    assert isinstance(one("let x = {q, v}").value, ast.Selector)  # type: ignore[attr-defined]
    assert isinstance(one("let x = {-1: 4}").value, ast.Table)  # type: ignore[attr-defined]
    assert one("param r").value is None  # type: ignore[attr-defined]
    assert one('let x = "a\\u00e9\\n\\"\\\\"').value == ast.String('aé\n"\\')  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("30%", 0.3, "%"), ("1.1B", 1_100_000_000, "B"), ("10k", 10_000, "k"), ("2GiB", 2**31, "GiB"), ("500MB", 5 * 10**8, "MB"), ("1e-4", 1e-4, ""),
     ("-1", -1, ""), ("0.5%", 0.005, "%"), ("1.5KB", 1500, "KB"), ("0.7", 0.7, ""), ("1E3", 1000.0, ""), ("3T", 3 * 10**12, "T")],
)  # fmt: skip
def test_numbers(text: str, value: float, unit: str) -> None:
    number = one(f"let x = {text}").value  # type: ignore[attr-defined]
    assert number == ast.Number(value, unit) and type(number.value) is type(value) and number.text == text


def test_no_word_is_reserved() -> None:
    node = one(
        "adapt on(on = on, model = fold, skip = [\n  keep,\n  train\n]) on on.after, model.layers,\n  keep.x, fold keep model.y as as\nfreeze all on\n  model.z"
    )
    assert isinstance(node, ast.Operation)
    assert [to_text(s) for s in node.selectors] == ["on.after", "model.layers", "keep.x", "fold"]
    assert to_text(node.keep[0]) == "model.y" and node.name == "as"


def test_clauses_come_in_any_order_and_commas_may_trail() -> None:
    first = one("convert moe(top_k = 2,) on layers[0, 1,].{ffn, attn,}, using text keep a as b")
    second = one("convert moe(top_k = 2) as b keep a using text on layers[0, 1].{ffn, attn}")
    assert first == second
    assert one("expect trainable on a <= 5%") == one("expect trainable <= 5% on a")


def test_stages_nest_and_hold_their_place() -> None:
    stage = one("## warm\nstage warm {\n  freeze all on a\n  stage inner { fold x on b\n }\n}\n")
    assert isinstance(stage, ast.Stage) and stage.doc == "warm"
    assert [type(s) for s in stage.body] == [ast.Operation, ast.Stage] and stage.span.text.endswith("}\n}")


def test_merge_weights() -> None:
    node = one("merge ties of a * 0.5, b * -1, c on layers[*] as d")
    assert isinstance(node, ast.Merge)
    assert [(w.name, w.weight and w.weight.value) for w in node.of] == [("a", 0.5), ("b", -1), ("c", None)]


@pytest.mark.parametrize(
    ("name", "raw", "code"),
    [("a.surg", b"surg 1\n\xff", "S0142"), ("b.surg", "surg 1".encode("utf-16"), "S0142"), ("missing.surg", None, "S0140"), (".", None, "S0140"), ("a\0b", None, "S0141")],
)  # fmt: skip
def test_unreadable_files(tmp_path: Path, name: str, raw: bytes | None, code: str) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(SurgeryError) as caught:
        read_source(f"{tmp_path}/{name}")
    assert caught.value.diagnostics[0].code == code and caught.value.exit_code == 2


def test_a_missing_file_offers_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "quickstart.surg").write_text("surg 1\n")
    with pytest.raises(SurgeryError) as caught:
        read_source(tmp_path / "quikstart.surg")
    assert "quickstart.surg" in caught.value.diagnostics[0].help[0]
    assert read_source(tmp_path / "quickstart.surg").text == "surg 1\n"


LARGE = {
    "parentheses": "surg 1\nadapt x(" + "(" * 100_000,
    "braces": "surg 1\nfold x on " + "{" * 100_000 + "a" + "}" * 100_000,
    "stages": "surg 1\n" + "stage a {\n" * 100_000,
    "garbage": "surg 1\n" + "".join(chr(i * 7919 % 251) for i in range(1_000_000)),
    "prose": "surg 1\n" + "lorem ipsum, dolor sit amet!\n" * 35_000,
}


@pytest.mark.parametrize("kind", LARGE)
def test_hostile_texts_give_few_diagnostics(kind: str) -> None:
    problems = parse(Source("x.surg", LARGE[kind]))[1]
    assert 1 <= len(problems) <= 51


def test_time_is_linear_in_the_number_of_statements() -> None:
    line = "adapt lora(rank = 8, dropout = 5%) on layers[*].attn.{q, v}\n"

    def seconds(count: int) -> float:
        text = "surg 1\n" + line * count
        start = time.process_time()
        assert len(parse(Source("x.surg", text))[0].statements) == count + 1
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 40 * seconds(1000)


def test_parsing_imports_neither_lark_nor_torch() -> None:
    code = "import sys; from surgery.grammar import parser, formatter; from surgery.core.source import Source; formatter.format_text(Source('x', 'surg 1')); print([m for m in ('lark', 'torch', 'difflib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_numbers_in_messages() -> None:
    assert [units.format_count(n) for n in (1_100_000_000, 999, 22_713_216, 12_000, 0, 999_999)] == [
        "1.1B",
        "999",
        "22.71M",
        "12k",
        "0",
        "1M",
    ]
    assert [units.format_bytes(n) for n in (2**31, 1, 512, 1536, 2**40)] == ["2GiB", "1 byte", "512 bytes", "1.5KiB", "1TiB"]
    assert [units.format_share(x) for x in (0.005, 0.3, 1.0, 0.00001)] == ["0.5%", "30%", "100%", "1.0e-03%"]
    assert [units.dimension(u) for u in ("%", "B", "GiB", "", "q")] == ["share", "count", "bytes", "", ""]
