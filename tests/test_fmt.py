"""The layout of `surgery fmt`."""

from __future__ import annotations

import pytest

from surgery.core.source import Source
from surgery.grammar.formatter import format_text

CASES = {
    "spaces": (
        "surg   1\nadapt lora( rank=8 ,alpha = 16,)  on layers [ * ] . attn.{ q,v }\n",
        "surg 1\nadapt lora(rank = 8, alpha = 16) on layers[*].attn.{q, v}\n",
    ),
    "blank lines": ('\n\nsurg 1\n\n\n\nmodel "x"\n\n', 'surg 1\n\nmodel "x"\n'),
    "comments": (
        "surg 1 # one\n#two  \n\n\n##  three\nfold x on a# four\n# five",
        "surg 1  # one\n# two\n\n##  three\nfold x on a  # four\n# five\n".replace("# two", "#two"),
    ),
    "line ends": ("surg 1\r\nfold x\r\n\ton a\r\n", "surg 1\nfold x on a\n"),
    "joined": ("surg 1\nfold x(\n  a = 1,\n  b = [1,2]\n)\n  on c,\n  d\n", "surg 1\nfold x(a = 1, b = [1, 2]) on c, d\n"),
    "stages": (
        "surg 1\nstage a { fold x on b # why\n\n\nstage c {\n} }\n",
        "surg 1\nstage a {\n  fold x on b  # why\n\n  stage c {\n  }\n}\n",
    ),
    "inner comments": (
        "surg 1\nadapt x(\n rank=8, # eight\n      # more\n  a = [\n1,\n2 ] )\non b\n",
        "surg 1\nadapt x(\n    rank = 8,  # eight\n    # more\n    a = [\n      1,\n      2])\n  on b\n",
    ),
    "tables and signs": (
        "surg 1\nlet x={0..3:4,4..:-1e-4}\nexpect params<=1.1B of base\nmerge m of a*0.5,b*-1\n",
        "surg 1\nlet x = {0..3: 4, 4..: -1e-4}\nexpect params <= 1.1B of base\nmerge m of a * 0.5, b * -1\n",
    ),
    "lists and indices": (
        "surg 1\nfold x(a =[1],b=f([2],  [3])) on l[0..4   by 2] . { a,b } [1]\n",
        "surg 1\nfold x(a = [1], b = f([2], [3])) on l[0..4 by 2].{a, b}[1]\n",
    ),
    "place on a new line": (
        "surg 1\nconvert moe(experts = {16..19: 4, 20..21: 8}, top_k = 2, split = kmeans) on layers[16..21].ffn using text as moe_ffn\n",
        "surg 1\nconvert moe(experts = {16..19: 4, 20..21: 8}, top_k = 2, split = kmeans)\n  on layers[16..21].ffn using text as moe_ffn\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layout(name: str) -> None:
    text, expected = CASES[name]
    formatted, problems = format_text(Source("x.surg", text))
    assert not problems
    assert formatted == expected
    assert format_text(Source("x.surg", formatted))[0] == formatted


def test_long_statements_spread_parameters_then_selectors() -> None:
    parameters = ", ".join(f"parameter_{i} = {i}" for i in range(8))
    selectors = ", ".join(f"encoder.layers[{i}].attn.{{q, k, v, o}}" for i in range(4))
    formatted, _ = format_text(Source("x.surg", f"surg 1\nadapt lora({parameters}) on {selectors} using text\n"))
    lines = formatted.splitlines()
    assert lines[1] == "adapt lora(" and lines[2] == "  parameter_0 = 0," and lines[9] == "  parameter_7 = 7," and lines[10] == ")"
    assert lines[11] == "  on encoder.layers[0].attn.{q, k, v, o}," and lines[12] == "    encoder.layers[1].attn.{q, k, v, o},"
    assert lines[-1] == "  using text" and all(len(line) <= 110 for line in lines)


def test_bare_shares_become_percentages() -> None:
    text = (
        "surg 1\nprune heads(ratio = 0.3, seed = 0, floor = [0.25, 1, 5%], k = f(0.5)) on a\nstage s {\n  prune ffn(ratio = 1e-3) on b\n}\n"
    )
    formatted, _ = format_text(Source("x.surg", text), lambda verb, method, name: verb == "prune" and name in ("ratio", "floor", "k"))
    assert "ratio = 30%, seed = 0, floor = [25%, 100%, 5%], k = f(0.5)" in formatted and "prune ffn(ratio = 0.1%)" in formatted


def test_a_broken_text_stays_as_it_is() -> None:
    text = "surg 1\nfold   x on\n"
    formatted, problems = format_text(Source("x.surg", text))
    assert formatted == text and [p.code for p in problems] == ["S0112"]
