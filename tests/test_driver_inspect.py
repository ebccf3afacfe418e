"""`show`, `select` and `diff` from end to end, on models, artifacts, specs and saved plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.driver_support import LORA, checkpoint, model, surgery, write

SPEC = """surg 1

## The pair that trains.
adapt lora(rank = 4) on layers[*].attn.{q, v} as pair
insert bottleneck(width = 8) after layers[0].ffn
emit torch to "out"
"""


@pytest.fixture
def artifact(here: Path) -> Path:
    write("a.surg", SPEC)
    assert surgery("compile", "a.surg", model("bert")).code == 0
    return here


def test_show_json(here: Path) -> None:
    shown = surgery("show", model("llama"), "--format", "json").json
    assert list(shown) == ["schema", "family", "params", "bytes", "stacks", "sites", "unresolved"]
    assert (shown["schema"], shown["family"], shown["stacks"]) == ("surgery.show/1", "llama", [{"name": "layers", "layers": 3}])
    assert shown["bytes"] == 4 * shown["params"]
    keys = ["role", "path", "op", "rows", "shape", "dtype", "heads", "kv_heads", "head_dim", "tied_to"]
    assert {tuple(s) for s in shown["sites"]} == {tuple(keys)}
    at = {s["role"]: s for s in shown["sites"]}
    for i in range(3):
        attention = at[f"layers[{i}].attn"]
        assert (attention["heads"], attention["kv_heads"], attention["head_dim"]) == (4, 2, 8)
        assert at[f"layers[{i}].attn.k"]["shape"] == [16, 32]
        assert at[f"layers[{i}].attn.q"]["path"] == f"model.layers.{i}.self_attn.q_proj"
        assert at[f"layers[{i}].ffn.gate"]["shape"] == [64, 32]
    assert at["head"]["path"] == "lm_head" and at["embed.tokens"]["path"] == "model.embed_tokens"


def test_show_text(here: Path) -> None:
    text = surgery("show", model("bert")).out
    assert text.startswith("config:bert.json: bert (BertModel), 32,032 parameters, 125.1 KiB\nstacks: layers (3 layers)\n")
    assert "\n  layers[0..2].attn.q " in text and "encoder.layer.*.attention.self.query" in text and "4 heads of 8" in text
    assert "added by surgery" not in text


def test_show_dims(here: Path) -> None:
    """Every stored axis as its expression; what uses a class and why it cannot be cut."""
    out = surgery("show", model("gpt2"), "--dims", "*.h.0.attn.c_attn.*").out
    rows = out.split("\n\n")[0].splitlines()
    assert len(rows) == 2
    assert rows[0].split("  ", 1) == ["transformer.h.0.attn.c_attn.weight", "[C0, [(H0*d0)+[(H0*d0)+(H0*dv0)]]]"]
    assert "  H0 " in out and "contract" in out and "norm" in out
    shown = surgery("show", model("gpt2"), "--dims", "--format", "json").json
    assert (shown["schema"], list(shown)) == ("surgery.dims/1", ["schema", "parameters", "classes"])
    axes = {p["name"]: p["axes"] for p in shown["parameters"]}
    assert [a["size"] for a in axes["transformer.h.0.attn.c_attn.weight"]] == [32, 96]
    assert axes["transformer.h.0.attn.c_attn.weight"][0]["classes"] == axes["transformer.wte.weight"][1]["classes"]
    classes = {c["name"]: c for c in shown["classes"]}
    rows_of_table = classes[axes["transformer.wte.weight"][0]["classes"][0]]
    assert rows_of_table["fixed"].startswith("its rows are looked up by number") and "indexed" in rows_of_table["flags"]
    assert classes[axes["transformer.h.0.mlp.c_fc.weight"][1]["classes"][0]]["fixed"] is None
    assert surgery("show", model("gpt2"), "--dims", "nothing.*").codes == ["S0315"]


def test_every_role_selects_exactly_its_site(here: Path) -> None:
    """What `show` prints as a role is a selector for that site and no other."""
    from surgery import driver
    from surgery.core.selector import select
    from surgery.inspection import parse_selector

    for family in ("bert", "gpt2", "bart"):
        anatomy = driver.show(model(family)).program.anatomy
        for site in anatomy.sites:
            assert [s.role for s in select(anatomy, parse_selector(site.role))] == [site.role]


def test_show_an_artifact(artifact: Path) -> None:
    text = surgery("show", "out").out
    assert text.startswith("out: bert (BertModel), 34,120 parameters")
    assert (
        "added by surgery:\n  @pair: layers[0..2].attn.q.pair, layers[0..2].attn.v.pair\n  @bottleneck: layers[0].ffn.bottleneck\n" in text
    )


def test_blame(artifact: Path) -> None:
    """For every tensor that surgery made: the file, the line and the statement; for all others nothing."""
    ran = surgery("show", "out", "--blame")
    rows = ran.out.partition("made or changed by:\n")[2].splitlines()
    heads = [r.split()[0] for r in rows if r.startswith("  ") and not r.startswith("   ")]
    assert len(heads) == 2 * 6 + 4 and all(".pair." in h or ".bottleneck." in h for h in heads)
    for i, row in enumerate(rows):
        if row.startswith("  ") and not row.startswith("   "):
            wanted = "a.surg:4:1  adapt lora" if ".pair." in row else "a.surg:5:1  insert bottleneck"
            assert rows[i + 1].strip() == wanted
    one = surgery("show", "out", "encoder.layer.1.*.query.pair.*").out
    heads = [r.split()[0] for r in one.partition("made or changed by:\n")[2].splitlines() if not r.startswith("   ")]
    assert len(heads) == 2 and all(h.startswith("encoder.layer.1.attention.self.query.pair.") for h in heads)
    assert one.startswith("made or changed by:\n"), "only the history"
    assert "nothing was made or changed by surgery" in surgery("show", "config:bert.json", "--blame").out
    untouched = surgery("show", "out", "encoder.layer.*.attention.self.key.*")
    assert (untouched.code, untouched.out) == (0, "none of the 6 tensors of this name was made or changed by surgery\n")


def test_blame_as_json(artifact: Path) -> None:
    """What the text says of every tensor, under an optional key; without --blame the key is not there."""
    plain, blamed = (surgery("show", "out", *more, "--format", "json").json for more in ([], ["--blame"]))
    assert "blame" not in plain and blamed["schema"] == plain["schema"] == "surgery.show/1"
    text = [row.strip() for row in surgery("show", "out", "--blame").out.partition("made or changed by:\n")[2].splitlines()]
    told = []
    for entry in blamed["blame"]:
        told.append(f"{entry['name']} {entry['shape']}")
        told += [f"{s['file']}:{s['line']}:{s['column']}  {s['verb']} {s['method']}" for s in entry["statements"]]
        told += [row.strip() for row in entry["value"]]
    assert len(blamed["blame"]) == 2 * 6 + 4 and told == text
    one = surgery("show", "out", "encoder.layer.1.*.query.pair.*", "--format", "json").json["blame"]
    assert one == [e for e in blamed["blame"] if e["name"].startswith("encoder.layer.1.attention.self.query.pair.")] and len(one) == 2
    assert surgery("show", "config:bert.json", "--blame", "--format", "json").json["blame"] == []


@pytest.mark.parametrize("more", [[], ["--dims"], ["--blame"]])
def test_a_name_that_no_tensor_has(artifact: Path, more: list[str]) -> None:
    ran = surgery("show", "out", "zzz*", *more)
    assert (ran.code, ran.codes, ran.out) == (1, ["S0315"], "")
    assert "no tensor of out is called `zzz*`" in ran.err
    near = surgery("show", "out", "encoder.layer.0.attention.self.query.wieght", *more)
    assert near.codes == ["S0315"] and "did you mean `encoder.layer.0.attention.self.query.weight`" in near.err


def test_select(artifact: Path) -> None:
    ran = surgery("select", "layers[0, 2].attn.{q, v}", "--model", "config:bert.json", "--format", "json")
    assert (ran.json["schema"], ran.json["selector"]) == ("surgery.select/1", "layers[0, 2].attn.{q, v}")
    assert [s["role"] for s in ran.json["sites"]] == [f"layers[{i}].attn.{x}" for i in (0, 2) for x in "qv"]
    text = surgery("select", "layers[0].attn.{q, k}", "--model", "out").out.splitlines()
    assert text[0] == "layers[0].attn.{q, k}: 2 sites"
    assert text[1].split() == ["layers[0].attn.q", "linear", "32", "x", "32", "encoder.layer.0.attention.self.query", "(+2", "added)"]
    assert text[2].split() == ["layers[0].attn.k", "linear", "32", "x", "32", "encoder.layer.0.attention.self.key"]
    assert surgery("select", "@pair", "--model", "out", "--format", "json").json["sites"][0]["path"].endswith("query.pair")


@pytest.mark.parametrize(
    ("selector", "code"),
    [
        ("layers[*].attn.qq", "S0301"), ("layers[9]", "S0303"), ("layers[*].attn.{q, gate}", "S0302"), ("@pair", "S0306"), ('"no.*.path"', "S0305"),
        ("layers[*].attn.q, layers[*].attn.v", "S0311"), ("layers[0]\nfreeze all on layers[1]", "S0311"), ("layers[0] as x", "S0311"),
    ],
)  # fmt: skip
def test_select_nothing(here: Path, selector: str, code: str) -> None:
    ran = surgery("select", selector, "--model", model("bert"))
    assert (ran.code, ran.codes, ran.out) == (1, [code], "")


@pytest.mark.parametrize("selector", ["", "layers[", "{{{{", "1 + 1", "layers..q", "\0"])
def test_select_what_is_no_selector(here: Path, selector: str) -> None:
    ran = surgery("select", selector, "--model", model("bert"))
    assert ran.code in (1, 2) and len(ran.codes) >= 1 and ran.codes[0][:3] in ("S01", "S03"), ran.err


def test_diff_of_specs(here: Path) -> None:
    write("a.surg", f'surg 1\nmodel "{model("bert")}"\nadapt lora(rank = 4) on layers[*].attn.{{q, v}}\nexpect trainable <= 50%\n')
    write("b.surg", f'surg 1\nmodel "{model("bert")}"\nadapt lora(rank = 16) on layers[*].attn.q\nexpect trainable <= 50%\n')
    same = surgery("diff", "a.surg", "a.surg")
    assert (same.code, same.out) == (0, "a.surg and a.surg do not differ\n")
    ran = surgery("diff", "a.surg", "b.surg", "--format", "json")
    assert ran.code == 1 and list(ran.json) == ["schema", "a", "b", "differences"] and ran.json["schema"] == "surgery.diff/1"
    found = {d["what"]: (d["a"], d["b"]) for d in ran.json["differences"]}
    assert found["total trainable"] == ("1,536", "3,072") and len(ran.json["differences"]) == len(found)
    assert found["adapt lora params"][0].count('"rank": 4') == 1 and found["adapt lora params"][1].count('"rank": 16') == 1
    assert found["adapt lora on layers[0].attn.v"] == ("[32, 32] -> [32, 32], +256 -0, 256 train", "")
    assert found["adapt lora on layers[0].attn.q"][1] == "[32, 32] -> [32, 32], +1024 -0, 1024 train"
    text = surgery("diff", "a.surg", "b.surg").out
    assert text.startswith("--- a.surg\n+++ b.surg\n") and "\n  + [32, 32] -> [32, 32], +1024 -0, 1024 train\n" in text
    assert surgery("diff", "a.surg", "b.surg", "--threshold", str(len(found))).code == 0
    assert surgery("diff", "a.surg", "b.surg", "--threshold", str(len(found) - 1)).code == 1


def test_diff_of_plans_and_artifacts(artifact: Path) -> None:
    surgery("plan", "a.surg", "config:bert.json", "--out", "one.json")
    surgery("plan", "a.surg", "config:bert.json", "--out", "two.json")
    assert surgery("diff", "one.json", "two.json").code == 0
    found = {d["what"]: (d["a"], d["b"]) for d in surgery("diff", "config:bert.json", "out", "--format", "json").json["differences"]}
    assert found["total params"] == ("32,032", "34,120")
    assert found["total trainable"] == ("32,032", "2,088")
    assert (
        found["added encoder.layer.0.attention.self.query.pair"][0] == ""
        and "adapt lora" in found["added encoder.layer.0.attention.self.query.pair"][1]
    )
    assert "tensor encoder.layer.0.attention.self.query.weight" not in found
    assert surgery("diff", "out", "out").code == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"schema": "surgery.plan/1"}', '{"schema": "surgery.plan/1", "model": 3, "steps": [3], "expect": null}',
     '{"schema": "surgery.plan/1", "model": {}, "steps": [{}], "expect": [], "totals": {}}', '{"schema": "surgery.plan/2"}'],
)  # fmt: skip
def test_diff_of_what_is_no_plan(here: Path, text: str) -> None:
    write("plan.json", text)
    ran = surgery("diff", "plan.json", "plan.json")
    assert (ran.code, ran.codes) == (2, ["S0312"])
    Path("plan.json").write_bytes(b"\xff\xfe")
    assert surgery("diff", "plan.json", "plan.json").codes == ["S0312"]


def test_diff_of_nothing(here: Path) -> None:
    ran = surgery("diff", "nowhere", "elsewhere")
    assert (ran.code, ran.codes) == (2, ["S0701"])


# ------------------------------------------------------------------ a second spec on an artifact


def test_specs_chain(here: Path) -> None:
    """Adapters on an artifact that has adapters, folded later: every stage computes what the one before computed."""
    import torch

    import surgery as api

    folder = checkpoint("bert")
    write("one.surg", LORA + 'emit torch to "one"\n')
    write(
        "two.surg", 'surg 1\nadapt lora(rank = 2) on layers[*].attn.{q, k} as more\nexpect trainable == 768 for more\nemit torch to "two"\n'
    )
    write(
        "three.surg",
        'surg 1\nfold all on layers[*].**\nexpect same_output(at = fold) within 1e-5\nexpect trainable == 0\nexpect params == 32032\nemit torch to "three"\n',
    )
    assert surgery("compile", "one.surg", folder).code == 0
    module = api.load("one")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    api.save(module, "trained")
    for spec, ref in (("two.surg", "trained"), ("three.surg", "two")):
        ran = surgery("compile", spec, ref)
        assert ran.code == 0, ran.err
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outs = [
            api.load(x).eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            for x in ("one", "trained", "two", "three")
        ]
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    assert torch.allclose(outs[1], outs[2], atol=1e-6) and torch.allclose(outs[2], outs[3], atol=1e-5)
    blame = surgery("show", "two", "--blame").out
    assert "one.surg:3:1  adapt lora" in blame and "two.surg:2:1  adapt lora" in blame
    folded = surgery("show", "three", "encoder.layer.0.attention.self.query.weight").out
    assert "one.surg:3:1  adapt lora" in folded and "two.surg:2:1  adapt lora" in folded and "three.surg:2:1  fold all" in folded
    assert json.loads(Path("three/surgery.json").read_text("utf-8"))["attachments"] == []
