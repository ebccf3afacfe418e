"""What people get wrong, through the command line: the exact code, the exit code, never a traceback, and nothing written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.driver_support import Ran, model, surgery, write

HEAD = "surg 1\n"
GOOD = "adapt lora(rank = 4) on layers[*].attn.q\n"


def check(text: str, verb: str = "check", *more: str) -> Ran:
    write("a.surg", text)
    before = sorted(p.name for p in Path().iterdir())
    ran = surgery(verb, "a.surg", *more)
    assert sorted(p.name for p in Path().iterdir()) == before
    return ran


NO_MODEL = {
    "unknown edition": ("surg 7\n" + GOOD, 1, "S0103", "edition 7"),
    "no edition": (GOOD, 1, "S0102", "surg 1"),
    "unknown verb": (HEAD + "adopt lora(rank = 4) on layers\n", 1, "S0106", "adopt"),
    "unknown method": (HEAD + "adapt lorra(rank = 4) on layers[*].attn.q\n", 1, "S0211", "lora"),
    "method of another verb": (HEAD + "freeze lora(rank = 4) on layers[*].attn.q\n", 1, "S0211", "lora"),
    "unknown parameter": (HEAD + "adapt lora(rnk = 4) on layers[*].attn.q\n", 1, "S0212", "rank"),
    "unknown unit": (HEAD + "adapt lora(rank = 4zz) on layers[*].attn.q\n", 1, "S0120", "4zz"),
    "wrong unit": (HEAD + "adapt lora(rank = 4MB) on layers[*].attn.q\n", 1, "S0223", "rank"),
    "wrong type": (HEAD + 'adapt lora(rank = "four") on layers[*].attn.q\n', 1, "S0220", "rank"),
    "below the range": (HEAD + "adapt lora(rank = 0) on layers[*].attn.q\n", 1, "S0222", "rank"),
    "above the range": (HEAD + "adapt lora(rank = 4, dropout = 150%) on layers[*].attn.q\n", 1, "S0222", "dropout"),
    "two adapters of one name": (
        HEAD + "adapt lora(rank = 4) on layers[*].attn.q as x\nadapt lora(rank = 4) on layers[*].attn.v as x\n", 1, "S0202", "`x`",
    ),
    "import that is not there": (HEAD + 'import "none.surg" as n\n' + GOOD, 1, "S0205", "none.surg"),
    "unknown quantity": (HEAD + GOOD + "expect parms <= 3\n", 1, "S0215", "params"),
    "unknown backend": (HEAD + GOOD + 'emit tensorflow to "x"\n', 1, "S0213", "torch"),
    "keep where nothing is cut": (HEAD + "adapt lora(rank = 4) on layers[*].attn.q keep layers[0].**\n", 1, "S0238", "except"),
    "keep own where nothing is shared": (HEAD + "adapt lora(rank = 4) on layers[*].attn.q keep own norm\n", 1, "S0238", "keep own"),
    "emit twice to one place": (HEAD + GOOD + 'emit torch to "x"\nemit onnx to "x"\n', 1, "S0403", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MODEL)
def test_found_without_a_model(here: Path, name: str) -> None:
    text, code, wanted, words = NO_MODEL[name]
    for verb in ("check", "plan", "compile"):
        ran = check(text, verb)
        assert ran.code == code
        assert ran.codes == [wanted]
        assert words in ran.err


ON_BERT = {
    "nothing": ("adapt lora(rank = 4) on layers[*].attn.qq\n", "S0301", "`layers[*]` 3"),
    "no such part": ("adapt lora(rank = 4) on decoder.layers[*].attn.q\n", "S0301", ""),
    "partly, a set": ("adapt lora(rank = 4) on layers[*].attn.{q, gate}\n", "S0302", "gate"),
    "partly, a layer": ("adapt lora(rank = 4) on layers[1..2].attn.q, layers[*].cross.q\n", "S0301", "cross"),
    "past the last layer": ("adapt lora(rank = 4) on layers[3].attn.q\n", "S0303", "3 layers"),
    "a range past the last layer": ("adapt lora(rank = 4) on layers[1..3].attn.q\n", "S0303", "3 layers"),
    "a path": ('adapt lora(rank = 4) on "encoder.layer.*.nothing"\n', "S0305", "nothing"),
    "a list of another length": ("adapt lora(rank = [4, 8]) on layers[*].attn.q\n", "S0307", "2 values"),
    "a table with a hole": ("adapt lora(rank = {0..1: 4}) on layers[*].attn.q\n", "S0308", "1 layer"),
    "nothing taken away": ("adapt lora(rank = 4) on layers[*].attn.q except layers[*].ffn\n", "S0313", "layers[0..2].ffn"),
    "nothing left": ("adapt lora(rank = 4) on layers[*].attn.q except layers\n", "S0310", "none is left"),
    "a name of nothing": ("freeze all on @pair\n", "S0201", "@pair"),
}


@pytest.mark.parametrize("name", ON_BERT)
def test_found_with_a_model(here: Path, name: str) -> None:
    text, wanted, words = ON_BERT[name]
    reference = model("bert")
    for verb in ("plan", "compile"):
        ran = check(HEAD + text + 'emit torch to "out"\n', verb, reference)
        assert (ran.code, ran.codes) == (1, [wanted])
        assert words in ran.err


def test_a_name_that_a_failed_statement_would_have_made_is_not_reported_again(here: Path) -> None:
    ran = check(HEAD + "adapt lora(rank = 4) on layers[*].attn.qq as x\nfreeze all on @x as y\nfold all on @x\n", "plan", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0301"])


def test_except_everything_below_takes_regions_away(here: Path) -> None:
    text = (
        HEAD
        + "insert bottleneck(width = 4) after layers[*].{attn, ffn} except layers[-1].**, layers[0].attn.** as a\nexpect sites for a == 3\n"
    )
    ran = check(text, "plan", model("bert"))
    assert (ran.code, ran.codes) == (0, [])


def test_ambiguous_between_two_stacks(here: Path) -> None:
    ran = check(HEAD + GOOD, "plan", model("bart"))
    assert (ran.code, ran.codes) == (1, ["S0304"])
    assert "encoder.layers" in ran.err and "decoder.layers" in ran.err


def test_every_error_of_a_walk_is_reported(here: Path) -> None:
    text = "adapt lora(rank = 4) on layers[7].attn.q\nadapt lora(rank = 4) on layers[*].attn.qq\nfreeze all on nowhere\nexpect trainable == 3\n"
    ran = check(HEAD + text, "plan", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0303", "S0301", "S0301"])


def test_a_parameter_that_nobody_sets(here: Path) -> None:
    text = HEAD + "param r\nadapt lora(rank = r) on layers[*].attn.q\n"
    ran = check(text)
    assert (ran.code, ran.codes) == (1, ["S0206"])
    assert "parameter `r` has no value" in ran.err
    text = HEAD + "param r = 4\nadapt lora(rank = r) on layers[*].attn.q\n"
    ran = check(text, "check", "--set", "q=4")
    assert ran.code == 1 and ran.codes == ["S0207"]
    ran = check(text, "check", "--set", "r=nonsense!")
    assert (ran.code, ran.codes) == (1, ["S0208"])


def test_import_cycle(here: Path) -> None:
    write("b.surg", HEAD + 'import "a.surg" as a\nlet x = 4\n')
    ran = check(HEAD + 'import "b.surg" as b\n' + GOOD)
    assert ran.code == 1 and ran.codes == ["S0235"]
    assert "a.surg" in ran.err and "b.surg" in ran.err


def garbage() -> dict[str, bytes]:
    draw = random.Random(0)
    letters = "abc {}[]()=,.*\"'#\n@%0123456789→é\t"
    return {
        "random bytes": draw.randbytes(1 << 20),
        "random text": "".join(draw.choices(letters, k=1 << 20)).encode(),
        "one line": b"x" * (1 << 20),
        "nulls": b"\0" * (1 << 20),
        "braces": b"surg 1\nadapt lora(rank = 4) on layers" + b"{" * 100_000,
        "balanced braces": b"surg 1\nlet x = " + b"[" * 50_000 + b"]" * 50_000 + b"\n",
        "nested stages": b"surg 1\n" + b"stage a {\n" * 5_000 + b"}\n" * 5_000,
        "parentheses": b"surg 1\nadapt lora(rank = " + b"f(" * 50_000 + b")" * 50_000 + b") on layers\n",
        "latin-1": "surg 1\n# caf\xe9\n".encode("latin-1"),
        "utf-16": "surg 1\n".encode("utf-16"),
        "empty": b"",
        "an unclosed string": b'surg 1\nmodel "minilm\n',
        "one quote": b'"',
    }


@pytest.mark.parametrize("name", garbage())
def test_garbage(here: Path, name: str) -> None:
    Path("a.surg").write_bytes(garbage()[name])
    ran = surgery("check", "a.surg")
    assert ran.code in (1, 2) and ran.codes
    assert len(ran.err) < 200_000, "a megabyte of garbage is no reason for a megabyte of findings"


def test_line_ends_and_tabs_change_nothing(here: Path) -> None:
    text = HEAD + "\nadapt lora(\n  rank = 4\n)  on layers[*].attn.q\n"
    reference = model("bert")
    write("a.surg", text)
    plain = surgery("plan", "a.surg", reference, "--format", "json").json
    Path("a.surg").write_bytes(text.replace("  ", "\t").replace("\n", "\r\n").encode())
    assert surgery("plan", "a.surg", reference, "--format", "json").json == plain
    Path("a.surg").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert surgery("plan", "a.surg", reference, "--format", "json").json == plain
    Path("a.surg").write_bytes(b"surg 1\r\n\r\n\tadapt\tlora(rank = 4)\ton layers[*].attn.qq\r\n")
    ran = surgery("plan", "a.surg", reference)
    assert ran.codes == ["S0301"] and "a.surg:3:" in ran.err


def test_a_long_spec_takes_linear_work(here: Path) -> None:
    """Calls made while checking 4,000 and 20,000 statements: five times the text, five times the work."""
    import sys

    from surgery.core.source import Source
    from surgery.front import check_source

    def calls(count: int) -> int:
        text = HEAD + "".join(f"adapt lora(rank = 4) on layers[{i}].attn.q as n{i}\n" for i in range(count))
        made = 0

        def count_call(frame: object, event: str, arg: object) -> None:
            nonlocal made
            made += event == "call"

        sys.setprofile(count_call)
        try:
            spec, found = check_source(Source("long.surg", text))
        finally:
            sys.setprofile(None)
        assert len(spec.statements) == count and not [d for d in found if d.is_error]
        return made

    assert calls(5_000) < 5.5 * calls(1_000)


def test_twenty_thousand_statements(here: Path) -> None:
    write("a.surg", HEAD + "".join(f"freeze all on layers[{i % 3}].attn.q\n" for i in range(20_000)))
    ran = surgery("check", "a.surg")
    assert ran.code == 0


def test_an_unreadable_spec(here: Path) -> None:
    for name in ("none.surg", "."):
        ran = surgery("plan", name)
        assert ran.code == 2 and ran.codes


def test_except_takes_away_the_parts_of_what_it_names(here: Path) -> None:
    write("a.surg", HEAD + "adapt lora(rank = 4) on layers[*].attn.{q, v} except layers[0], layers[1].attn.v\n")
    sites = surgery("plan", "a.surg", model("bert"), "--format", "json").json["steps"][0]["sites"]
    assert [s["role"] for s in sites] == ["layers[1].attn.q", "layers[2].attn.q", "layers[2].attn.v"]
