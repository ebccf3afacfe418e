"""`surgery plan` from end to end: every key of its JSON, every count against the live model and by hand, its text."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.driver_support import LORA, Ran, checkpoint, model, surgery, tree, write
from tests.zoo import ZOO

FULL = """surg 1

model "config:bert.json"

param r = 4

stage first {
  ## More rank at the top.
  adapt lora(rank = {0..1: r, 2: 8}, alpha = 16) on layers[*].attn.{q, v} as added
}
freeze all on embed.**
train power(a = 4, b = -0.51, eta_max = 0.02, batch = 256)

expect trainable <= 10%
expect params <= 110% of base
expect sparsity <= 50%
expect same_output(at = init) within 1e-6

emit torch(dtype = bf16) to "out"
"""

WIDTH, INNER, LAYERS, VOCAB, POSITIONS, TYPES, LENGTH = 32, 64, 3, 99, 64, 2, 128
BERT_PARAMS = (
    (VOCAB + POSITIONS + TYPES + 2) * WIDTH
    + LAYERS * (4 * (WIDTH * WIDTH + WIDTH) + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH)
    + WIDTH * WIDTH
    + WIDTH
)
BERT_FLOPS = LAYERS * (2 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + 4 * LENGTH * WIDTH) + 2 * WIDTH * WIDTH // LENGTH
ADDED = 2 * (4 + 4 + 8) * 2 * WIDTH


@pytest.fixture
def ran(here: Path) -> Ran:
    model("bert")
    write("full.surg", FULL)
    return surgery("plan", "full.surg", "--format", "json")


def live_params(family: str) -> int:
    return sum(p.numel() for p in ZOO[family].make_model().parameters())


def test_json_has_exactly_the_documented_keys(ran: Ran) -> None:
    plan = ran.json
    assert ran.code == 0 and ran.err == ""
    assert list(plan) == ["schema", "edition", "model", "steps", "totals", "expect", "diagnostics"]
    assert (plan["schema"], plan["edition"], plan["diagnostics"]) == ("surgery.plan/1", 1, [])
    assert list(plan["model"]) == ["ref", "family", "hash", "params", "bytes"]
    assert [list(s) for s in plan["steps"]] == [["span", "verb", "method", "params", "sites"]] * 4
    assert {k for s in plan["steps"] for k in s["span"]} == {"file", "line", "column"}
    sites = [x for s in plan["steps"] for x in s["sites"]]
    assert {tuple(x) for x in sites} == {("role", "path", "rows", "shape_before", "shape_after", "added", "removed", "trainable")}
    assert list(plan["totals"]) == [
        "params_before", "params_after", "trainable", "bytes_after", "flops_per_token_before", "flops_per_token_after",
    ]  # fmt: skip
    assert [list(e) for e in plan["expect"]] == [["text", "ok", "value", "limit"]] * 4


def test_values_by_hand(ran: Ran) -> None:
    plan = ran.json
    assert plan["model"]["ref"] == "config:bert.json" and plan["model"]["family"] == "bert" and len(plan["model"]["hash"]) == 64
    assert plan["model"]["params"] == BERT_PARAMS == live_params("bert")
    assert plan["model"]["bytes"] == 4 * BERT_PARAMS
    assert [(s["verb"], s["method"], s["span"]["line"], s["span"]["column"]) for s in plan["steps"]] == [
        ("adapt", "lora", 9, 3), ("freeze", "all", 11, 1), ("train", "power", 12, 1), ("emit", "torch", 19, 1),
    ]  # fmt: skip
    lora = plan["steps"][0]
    assert lora["span"]["file"] == "full.surg"
    assert lora["params"] == {"rank": [4, 4, 4, 4, 8, 8], "alpha": 16.0, "dropout": 0.0, "seed": 0, "shared": False}
    assert [s["role"] for s in lora["sites"]] == [f"layers[{i}].attn.{x}" for i in range(LAYERS) for x in "qv"]
    assert [s["path"] for s in lora["sites"]][:2] == [f"encoder.layer.0.attention.self.{x}" for x in ("query", "value")]
    for site, rank in zip(lora["sites"], lora["params"]["rank"], strict=True):
        assert site["shape_before"] == site["shape_after"] == [WIDTH, WIDTH] and site["rows"] == []
        assert (site["added"], site["removed"], site["trainable"]) == (2 * rank * WIDTH, 0, 2 * rank * WIDTH)
    assert plan["steps"][3]["params"] == {"dtype": "bf16", "to": "out"}
    assert plan["totals"] == {
        "params_before": BERT_PARAMS, "params_after": BERT_PARAMS + ADDED, "trainable": ADDED, "bytes_after": 4 * (BERT_PARAMS + ADDED),
        "flops_per_token_before": BERT_FLOPS, "flops_per_token_after": BERT_FLOPS + 2 * ADDED,
    }  # fmt: skip
    assert plan["expect"] == [
        {"text": "trainable <= 10%", "ok": True, "value": ADDED, "limit": pytest.approx((BERT_PARAMS + ADDED) / 10)},
        {"text": "params <= 110% of base", "ok": True, "value": BERT_PARAMS + ADDED, "limit": 35235.2},
        {"text": "sparsity <= 50%", "ok": None, "value": None, "limit": None},
        {"text": "same_output(at = init) within 1e-06", "ok": None, "value": None, "limit": 1e-6},
    ]


def llama_flops() -> int:
    """Four projections with two of four heads for keys and values, three of the feed-forward, attention, the head."""
    kv = WIDTH // 2
    return LAYERS * (2 * (2 * WIDTH * WIDTH + 2 * WIDTH * kv + 3 * WIDTH * INNER) + 4 * LENGTH * WIDTH) + 2 * WIDTH * VOCAB


def gpt2_flops() -> int:
    return LAYERS * (2 * (4 * WIDTH * WIDTH + 2 * WIDTH * 4 * WIDTH) + 4 * LENGTH * WIDTH) + 2 * WIDTH * VOCAB


def vit_flops() -> int:
    """Per sample: sixteen patches and a class token; the patch projection and the pooler once."""
    tokens, patch = 17, 3 * 4 * 4
    layer = 2 * tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + 4 * tokens * tokens * WIDTH
    return 2 * 16 * patch * WIDTH + LAYERS * layer + 2 * WIDTH * WIDTH


@pytest.mark.parametrize(
    ("family", "selector", "added", "flops"),
    [
        ("llama", "layers[*].attn.{q, k}", LAYERS * 4 * (2 * WIDTH + WIDTH + WIDTH // 2), llama_flops()),
        ("gpt2", "layers[*].attn.{q, v}", LAYERS * 4 * 2 * 2 * WIDTH, gpt2_flops()),
        ("vit", "layers[*].ffn.up", LAYERS * 4 * (WIDTH + INNER), vit_flops()),
    ],
)
def test_counts_of_families(here: Path, family: str, selector: str, added: int, flops: int) -> None:
    write("a.surg", f"surg 1\nadapt lora(rank = 4) on {selector}\n")
    plan = surgery("plan", "a.surg", model(family), "--format", "json").json
    assert plan["model"]["params"] == plan["totals"]["params_before"] == live_params(family)
    assert plan["totals"]["trainable"] == added == sum(s["added"] for s in plan["steps"][0]["sites"])
    assert plan["totals"]["params_after"] == live_params(family) + added
    assert plan["totals"]["flops_per_token_before"] == flops


def test_slices_name_their_rows(here: Path) -> None:
    """GPT-2 stores q, k and v in one transposed matrix: each is a site with the columns that are its own."""
    write("a.surg", "surg 1\nadapt lora(rank = 4) on layers[0].attn.{q, v}\n")
    sites = surgery("plan", "a.surg", model("gpt2"), "--format", "json").json["steps"][0]["sites"]
    assert [s["rows"] for s in sites] == [[[0, WIDTH]], [[2 * WIDTH, 3 * WIDTH]]]
    assert {s["path"] for s in sites} == {"transformer.h.0.attn.c_attn"}


def test_bytes_follow_the_dtypes_of_a_checkpoint(here: Path) -> None:
    ZOO["bert"].make_model().bfloat16().save_pretrained("half")  # type: ignore[operator]
    write("a.surg", LORA + 'emit torch to "out"\n')
    plan = surgery("compile", "a.surg", "half", "--format", "json").json["plan"]
    assert plan["model"]["bytes"] == 2 * BERT_PARAMS
    assert plan["totals"]["bytes_after"] == sum(t.numel() * t.element_size() for t in load_file("out/model.safetensors").values())
    assert plan["totals"]["bytes_after"] == 2 * BERT_PARAMS + 4 * plan["totals"]["trainable"], "what is added trains in fp32"


def test_compile_does_what_plan_shows(ran: Ran) -> None:
    planned = ran.json
    done = surgery("compile", "full.surg", "--format", "json").json
    assert (done["schema"], done["artifacts"][0], done["lock"]) == ("surgery.compile/1", "out", "full.surg.lock")
    compiled = done["plan"]
    assert [e["ok"] for e in compiled.pop("expect")] == [True] * 4 and len(planned.pop("expect")) == 4
    assert compiled == planned
    stored = json.loads(Path("out/surgery.json").read_text("utf-8"))["plan"]
    stored.pop("expect")
    assert stored == planned


def test_plan_reads_no_weights_and_writes_nothing(here: Path) -> None:
    """A file of the right size full of nothing behind its header plans like the real one."""
    write("a.surg", LORA + 'emit torch to "out"\n')
    folder = Path(checkpoint("bert"))
    before = surgery("plan", "a.surg", folder, "--format", "json").json
    file = folder / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert surgery("plan", "a.surg", folder, "--format", "json").json == before
    assert sorted(p.name for p in here.iterdir()) == ["a.surg", "bert"]


def test_out_file(ran: Ran) -> None:
    again = surgery("plan", "full.surg", "--out", "plan.json")
    assert again.code == 0 and again.out.startswith("plan of full.surg on config:bert.json")
    assert json.loads(Path("plan.json").read_text("utf-8")) == ran.json


def test_set_changes_the_parameters(ran: Ran) -> None:
    plan = surgery("plan", "full.surg", "--format", "json", "--set", "r=2").json
    assert plan["steps"][0]["params"]["rank"] == [2, 2, 2, 2, 8, 8]
    assert plan["totals"]["trainable"] == 2 * (2 + 2 + 8) * 2 * WIDTH


@pytest.mark.parametrize("format", ["text", "json", "sarif", "github"])
@pytest.mark.parametrize(
    "args",
    [["plan", "a.surg", "nowhere"], ["compile", "a.surg", "nowhere"], ["plan", "named.surg"], ["compile", "named.surg"], ["show", "nowhere"],
     ["select", "layers[*]", "--model", "nowhere"], ["diff", "nowhere", "a.surg"], ["plan", "nowhere.surg"], ["compile", "nowhere.surg"],
     ["plan", "a.surg", "config:nowhere.json"], ["plan", "a.surg", "empty"], ["plan", "a.surg"]],
)  # fmt: skip
def test_input_that_is_not_there_ends_with_2(here: Path, args: list[str], format: str) -> None:
    """A spec, a model, a config or the weights of one: the same in every format."""
    write("a.surg", LORA)
    write("named.surg", LORA.replace("\n\n", '\n\nmodel "nowhere"\n'))
    Path("empty").mkdir()
    before = tree(here)
    ran = surgery(*args, "--format", format)
    assert ran.code == 2, ran.out + ran.err
    assert tree(here) == before


def test_a_spec_on_the_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = model("bert")

    def typed(text: str, *args: str) -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return surgery(*args)

    write("a.surg", LORA + 'emit torch to "out"\n')
    text = Path("a.surg").read_text("utf-8")
    plan = typed(text, "plan", "-", reference)
    assert plan.code == 0 and plan.out == surgery("plan", "a.surg", reference).out.replace("plan of a.surg", "plan of <stdin>")
    assert typed("surg 1\nadapt lora(rnk = 8) on layers[*].attn.q\n", "plan", "-", reference).codes == ["S0212"]
    ran = typed(text, "compile", "-", reference)
    assert ran.code == 0 and (here / "out/surgery.json").exists()
    assert sorted(p.name for p in here.iterdir()) == ["a.surg", "bert.json", "out"], "no lock without a file"
    assert typed(text, "compile", "-", reference).code == 0, "the same text may replace its own output"
    assert typed(text.replace("4", "2"), "compile", "-", reference).codes == ["S0803"]
    assert typed(text, "compile", "-", reference, "--locked").codes == ["S0405"]
    assert typed(text, "check", "-").code == 0


def test_images_are_counted_per_image(here: Path) -> None:
    write("a.surg", LORA)
    for family, unit, tail in (("vit", "image", ""), ("bert", "token", " at length 128")):
        text = surgery("plan", "a.surg", model(family)).out
        (line,) = [row for row in text.splitlines() if "flops per" in row]
        assert line.startswith(f"  flops per {unit} ") and ("at length 128" in line) == bool(tail)
        shown = surgery("show", model(family)).out
        assert f"flops per {unit}: " in shown and ("at length" in shown) == bool(tail)


def test_the_model_of_the_command_line_wins(here: Path) -> None:
    write("a.surg", 'surg 1\nmodel "nowhere"\nadapt lora(rank = 4) on layers[*].attn.q\n')
    assert surgery("plan", "a.surg", model("vit"), "--format", "json").json["model"]["family"] == "vit"
    write("b.surg", LORA)
    ran = surgery("plan", "b.surg")
    assert (ran.code, ran.codes) == (2, ["S0701"])


def test_the_reference_in_a_spec_is_relative_to_it(here: Path) -> None:
    model("bert")
    write("specs/a.surg", 'surg 1\nmodel "config:../bert.json"\nadapt lora(rank = 4) on layers[*].attn.q\n')
    assert surgery("plan", "specs/a.surg").code == 0


def test_the_text_of_a_plan(ran: Ran) -> None:
    assert surgery("plan", "full.surg").out == TEXT


TEXT = """\
plan of full.surg on config:bert.json (bert, 32,032 parameters, 125.1 KiB)

stage first
      ## More rank at the top.
   9  adapt lora(rank = {0..1: r, 2: 8}, alpha = 16) on layers[*].attn.{q, v} as added
      6 sites: layers[0..2].attn.q, layers[0..2].attn.v (32 x 32)
      + 2,048 parameters, 2,048 train
      output at init: unchanged; folds: merge

  11  freeze all on embed.**
      4 sites: embed.tokens, embed.types, embed.positions, embed.norm (32 x 99, 32 x 2, 32 x 64 and 1 more)
      note: 5 tensors frozen

  12  train power(a = 4, b = -0.51, eta_max = 0.02, batch = 256)

  19  emit torch(dtype = bf16) to "out"

  ok      expect trainable <= 10%
          2,048 = 1,024 (encoder.layer.*.attention.self.query.added) + 1,024
          (encoder.layer.*.attention.self.value.added)
          6.009% of 34,080 params, limit 10% = 3,408.0
  ok      expect params <= 110% of base
          34,080
          106.4% of 32,032 params of the base, limit 110% = 35,235.2
  later   expect sparsity <= 50%
          measured by compile
  later   expect same_output(at = init) within 1e-06
          measured by compile

                      before      after
  parameters          32,032     34,080  +6.39%
  trainable           32,032      2,048  6.01% of the model after
  bytes            125.1 KiB  133.1 KiB  +6.39%
  flops per token     98.3 k      102 k  +4.17%, at length 128
"""


def test_every_number_of_the_json_is_a_number(ran: Ran) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        else:
            assert value is None or isinstance(value, str | bool | int) or math.isfinite(value)

    walk(ran.json)


@pytest.mark.parametrize("verb", ["plan", "compile"])
def test_a_backend_that_is_not_there_is_said_before_any_work(here: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to write instead, and beside the other findings of the spec."""
    from surgery.backends import registry

    real = registry.names()
    monkeypatch.setattr(registry, "names", lambda: [n for n in real if n in ("torch", "onnx", "report")])
    for name, word in (("pt2", "emit onnx"), ("peft", "emit torch"), ("transformers", "emit torch")):
        write("a.surg", LORA + f'emit torch to "out"\nemit {name} to "out.x"\nexpect trainable == 1\n')
        ran = surgery(verb, "a.surg", model("bert"))
        assert ran.code == 1 and "S0843" in ran.codes
        assert f"cannot emit `{name}` yet" in ran.err and f"write `{word} to" in ran.err and "emits onnx, report, torch" in ran.err
        assert not Path("out").exists()


@pytest.mark.parametrize(("name", "label"), [("lora", ""), ("news", " as news")])
def test_an_output_that_keeps_what_a_failed_line_would_have_made(here: Path, name: str, label: str) -> None:
    """That its name is missing is no finding of its own; a name that nothing makes is one."""
    write(
        "a.surg",
        f'surg 1\n\nadapt lora(rank = 2) on layers[9].attn.q{label}\nemit onnx(live = [@{name}]) to "a.onnx"\nemit onnx(live = [@other]) to "b.onnx"\n',
    )
    ran = surgery("plan", "a.surg", checkpoint("llama"))
    assert ran.code == 1 and ran.codes == ["S0303", "S0870"] and "`other`" in ran.err, ran.err


@pytest.mark.parametrize(("scope", "open_"), [("layer", False), ("global", True)])
def test_a_plain_checkpoint_of_counts_that_compile_chooses(here: Path, scope: str, open_: bool) -> None:
    write("a.surg", f'surg 1\n\nprune ffn(ratio = 25%, scope = {scope}) on layers[*].ffn\nemit transformers to "plain"\n')
    ran = surgery("plan", "a.surg", checkpoint("llama"))
    assert ran.code == 0 and ("compile chooses the counts, and refuses (S0862)" in ran.out) is open_, ran.out
