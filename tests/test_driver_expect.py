"""Expectations from end to end: every quantity with `on` and `for`, shares, every comparison, the checks, what a failure says and leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driver_support import LORA, Ran, checkpoint, model, surgery, tree, write

WIDTH, INNER, LAYERS, HEADS, RANK, LENGTH = 32, 64, 3, 4, 4, 128
BASE = 32032
LINEAR = WIDTH * WIDTH + WIDTH
ATTENTION = 4 * LINEAR
"""Of one layer, without its norm."""
FFN = 2 * WIDTH * INNER + INNER + WIDTH
ONE = 2 * RANK * WIDTH
"""Parameters of one low-rank pair."""
ADDED = 2 * LAYERS * ONE

SPEC = "surg 1\n\nadapt lora(rank = 4) on layers[*].attn.{q, v} as pair\n"


def plan(line: str, family: str = "bert", spec: str = SPEC) -> Ran:
    write("a.surg", f"{spec}expect {line}\n")
    return surgery("plan", "a.surg", model(family), "--format", "json")


QUANTITIES = [
    ("params", BASE + ADDED),
    ("params on layers[0].attn.q", LINEAR + ONE),
    ("params on layers[*].attn.{q, k}", LAYERS * (2 * LINEAR + ONE)),
    ("params on layers[0].attn", ATTENTION + 2 * ONE),
    ("params on layers[*].ffn", LAYERS * FFN),
    ("params for pair", ADDED),
    ("trainable", ADDED),
    ("trainable on layers[1..2].attn", 4 * ONE),
    ("trainable on layers[*].ffn", 0),
    ("trainable on layers[0].attn.q", ONE),
    ("trainable for pair", ADDED),
    ("trainable on layers[0], layers[2].attn.q for pair", 3 * ONE),
    ("trainable on layers[*].ffn for pair", 0),
    ("sites on layers[*].attn.gate?", 0),
    ("active_params", BASE + ADDED),
    ("active_params on layers[0].ffn.up", WIDTH * INNER + INNER),
    ("active_params for pair", ADDED),
    ("bytes", 4 * (BASE + ADDED)),
    ("bytes on layers[*].ffn.down", 4 * LAYERS * (WIDTH * INNER + WIDTH)),
    ("bytes for pair", 4 * ADDED),
    ("flops", LAYERS * (2 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + 4 * LENGTH * WIDTH) + 2 * WIDTH * WIDTH // LENGTH + 2 * ADDED),
    ("flops on layers[0].ffn", 2 * 2 * WIDTH * INNER),
    ("flops on layers[*].attn.k", LAYERS * 2 * WIDTH * WIDTH),
    ("layers", LAYERS),
    ("layers on layers[1..2]", 2),
    ("layers on layers[0].attn.{q, k}", 1),
    ("heads", LAYERS * HEADS),
    ("heads on layers[0]", HEADS),
    ("heads on layers[1..2].attn", 2 * HEADS),
    ("sites on layers[*].attn.{q, k, v}", 9),
    ("sites on @pair", 2 * LAYERS),
    ("sites for pair", 2 * LAYERS),
]


@pytest.mark.parametrize(("what", "value"), QUANTITIES, ids=[q for q, _ in QUANTITIES])
def test_quantities(here: Path, what: str, value: int) -> None:
    name, _, where = what.partition(" ")

    def text(amount: int) -> str:
        return f"{name} == {f'{amount / 1024}KiB' if name == 'bytes' else amount} {where}".rstrip()

    ran = plan(text(value))
    found = ran.json["expect"][0]
    assert (found["value"], found["limit"], found["ok"]) == (value, value, True)
    assert ran.code == 0
    wrong = plan(text(value + 1))
    assert wrong.code == 1 and [d["code"] for d in wrong.json["diagnostics"]] == ["S0601"]


@pytest.mark.parametrize(
    ("compare", "limits"),
    [
        ("<=", {ADDED - 1: False, ADDED: True, ADDED + 1: True}),
        (">=", {ADDED - 1: True, ADDED: True, ADDED + 1: False}),
        ("<", {ADDED - 1: False, ADDED: False, ADDED + 1: True}),
        (">", {ADDED - 1: True, ADDED: False, ADDED + 1: False}),
        ("==", {ADDED - 1: False, ADDED: True, ADDED + 1: False}),
        ("!=", {ADDED - 1: True, ADDED: False, ADDED + 1: True}),
    ],
)
def test_comparisons(here: Path, compare: str, limits: dict[int, bool]) -> None:
    for limit, ok in limits.items():
        ran = plan(f"trainable {compare} {limit}")
        assert (ran.json["expect"][0]["ok"], ran.code) == (ok, 0 if ok else 1), limit


def test_shares_are_of_the_model_after_or_of_the_base(here: Path) -> None:
    after = BASE + ADDED
    for line, limit in [
        ("trainable <= 5%", after * 0.05),
        ("trainable <= 5% of base", BASE * 0.05),
        ("active_params >= 10%", after * 0.1),
        ("params <= 110% of base", BASE * 1.1),
        ("bytes <= 100%", 4 * after),
        ("layers == 100% of base", LAYERS),
        ("heads >= 50%", LAYERS * HEADS / 2),
        ("params >= 50% on layers[*]", after / 2),
    ]:
        found = plan(line).json["expect"][0]
        assert found["limit"] == pytest.approx(limit), line
        assert found["ok"] is True, line
    # the same number of parameters is below a share of the larger model and above it of the smaller one
    share = 100 * (ADDED - 0.5) / BASE
    assert plan(f"trainable <= {share:.6f}%").code == 0
    assert plan(f"trainable <= {share:.6f}% of base").code == 1


def test_units_of_bytes_and_counts(here: Path) -> None:
    assert plan("bytes <= 132KiB").json["expect"][0]["limit"] == 132 * 1024
    assert plan("bytes <= 0.2MB").json["expect"][0]["limit"] == 200_000
    assert plan("params <= 33.568k").json["expect"][0]["ok"] is True


def test_expert_models_have_fewer_active_parameters(here: Path) -> None:
    """Two of four experts work for a token: half of the experts' parameters are idle."""
    experts = 3 * 4 * 3 * WIDTH * INNER
    found = plan("active_params >= 0", "mixtral", "surg 1\n\nfreeze all on head\n").json
    assert found["expect"][0]["value"] == found["model"]["params"] - experts // 2


def test_a_statement_below_does_not_count(here: Path) -> None:
    write("a.surg", "surg 1\nadapt lora(rank = 4) on layers[*].attn.q\nexpect trainable == 768\nadapt lora(rank = 4) on layers[*].attn.v\n")
    assert surgery("plan", "a.surg", model("bert")).code == 0


FAILED = """\
error[S0601]: expected trainable <= 1%
 --> a.surg:4:1
  |
4 | expect trainable <= 1%
  | ^^^^^^^^^^^^^^^^^^^^^^ 1,536 is not <= 335.7
  |
note: 1,536 = 768 (encoder.layer.*.attention.self.query.pair) + 768 (encoder.layer.*.attention.self.value.pair); 4.576% of 33,568 params, limit 1% = 335.7
help: change the operations above, or the limit if it is wrong
  = surgery explain S0601

1 error
"""


def test_a_failure_shows_both_sides_and_the_arithmetic(here: Path) -> None:
    plan("trainable <= 1%")
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.code == 1
    assert ran.err == FAILED
    assert "  FAILED  expect trainable <= 1%\n" in ran.out


def test_a_share_of_the_model_itself_says_what_was_meant(here: Path) -> None:
    write("a.surg", "surg 1\nprune ffn(ratio = 50%) on layers[*].ffn\nexpect params <= 70%\nexpect params <= 70% of base\n")
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.codes.count("S0601") == 2 and ran.err.count("of itself: write `params <= 70% of base` for one of the model before") == 1


def test_all_failures_are_reported_at_once(here: Path) -> None:
    write("a.surg", SPEC + "expect trainable == 0\nexpect layers == 4\nexpect heads == 12\n")
    assert surgery("plan", "a.surg", model("bert")).codes == ["S0601", "S0601"]


def test_a_failure_leaves_outputs_untouched(here: Path) -> None:
    write("a.surg", SPEC + 'emit torch to "out"\nemit report to "out.html"\n')
    assert surgery("compile", "a.surg", model("bert")).code == 0
    before, page, lock = tree("out"), tree("out.html"), tree("a.surg.lock")
    for line, code in [
        ("trainable <= 1%", "S0601"),
        ("sparsity >= 90%", "S0601"),
        ("runs(batch = 2, length = 100)", "S0602"),
        ("locked", "S0602"),
    ]:
        write("a.surg", SPEC.replace("rank = 4", "rank = 8") + f'expect {line}\nemit torch to "out"\nemit report to "out.html"\n')
        ran = surgery("compile", "a.surg", model("bert"))
        assert (ran.code, ran.codes, ran.out) == (1, [code], ""), line
        assert (tree("out"), tree("out.html"), tree("a.surg.lock")) == (before, page, lock)
    assert sorted(p.name for p in here.iterdir()) == ["a.surg", "a.surg.lock", "bert.json", "out", "out.html"]


def test_a_name_that_nothing_has(here: Path) -> None:
    write("a.surg", SPEC + "fold all on layers[*].**\nexpect trainable == 0 for pair\n")
    ran = surgery("plan", "a.surg", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0605"])
    assert "nothing in the model is named `pair`" in ran.err


def test_sparsity_counts_the_zeros_of_matrices(here: Path) -> None:
    """The second matrix of a fresh low-rank pair is zero: half of what was added, nothing else."""
    weights = 32416  # elements of all matrices: layers, embeddings and pooler, with the pairs
    for line, value in [
        ("sparsity == 50% for pair", 0.5),
        ("sparsity == 0% on layers[*].ffn", 0.0),
        ("sparsity <= 4%", ADDED / 2 / weights),
    ]:
        write("a.surg", SPEC + f"expect {line}\n")
        ran = surgery("compile", "a.surg", model("bert"), "--format", "json")
        assert ran.code == 0, ran.out
        assert ran.json["plan"]["expect"][0]["value"] == pytest.approx(value), line


SLICES = [
    ("gpt2", "layers[0].attn.q", 32 * 32 + 32),
    ("gpt2", "layers[0].attn.{q, v}", 2 * (32 * 32 + 32)),
    ("gpt2", "layers[*].attn.{q, k, v}", 3 * 3 * (32 * 32 + 32)),
    ("mixtral", "layers[0].ffn.experts[1].up", 64 * 32),
    ("mixtral", "layers[0].ffn.experts[1]", 3 * 64 * 32),
    ("mixtral", "layers[0].ffn.experts[0, 3].{up, down}", 4 * 64 * 32),
    ("mixtral", "layers[0].ffn.experts.{up, gate}", 2 * 4 * 64 * 32),
    ("mixtral", "layers[0].ffn.experts[1].up, layers[0].ffn.experts", 3 * 4 * 64 * 32),
]
"""(family, selector, elements): q, k, v are rows of one tensor, the experts' up and gate rows of one 3-D tensor."""


@pytest.mark.parametrize(("family", "selector", "elements"), SLICES)
def test_slices_and_experts_count_their_own_elements(here: Path, family: str, selector: str, elements: int) -> None:
    found = plan(f"params == {elements} on {selector}", family, "surg 1\n").json["expect"][0]
    assert (found["value"], found["ok"]) == (elements, True)


def test_sparsity_of_a_slice_counts_its_rows(here: Path) -> None:
    """Of the fused projection of GPT-2 only the queries are zero; of the experts' fused tensor one expert's gate."""
    import torch
    from safetensors.torch import load_file, save_file

    for family, name, zero, lines in [
        ("gpt2", "h.0.attn.c_attn.weight", lambda t: t[:, :32],
         {"layers[0].attn.q": 1.0, "layers[0].attn.{q, k}": 0.5, "layers[0].attn.v": 0.0, "layers[0].attn": 1024 / 4096}),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", lambda t: t,
         {"layers[0].ffn.experts[2].gate": 1.0, "layers[0].ffn.experts[2].up": 0.0, "layers[0].ffn.experts[1].gate": 0.0,
          "layers[0].ffn.experts[2]": 1 / 3, "layers[0].ffn.experts.gate": 1 / 4, "layers[0].ffn.experts": 1 / 12}),
    ]:  # fmt: skip
        folder = checkpoint(family)
        file = next(Path(folder).glob("*.safetensors"))
        tensors = load_file(file)
        stored = next(n for n in tensors if n.endswith(name))
        with torch.no_grad():
            zero(tensors[stored]).zero_()
        save_file(tensors, file, metadata={"format": "pt"})
        text = "surg 1\n" + "".join(f"expect sparsity <= 100% on {selector}\n" for selector in lines)
        ran = surgery("compile", write("a.surg", text), folder, "--format", "json", "--force")
        assert ran.code == 0, ran.out
        found = [e["value"] for e in ran.json["plan"]["expect"]]
        assert found == pytest.approx(list(lines.values())), family


@pytest.mark.parametrize(
    ("lines", "claim"),
    [
        ("expect same_output(at = init) within 1e-6", "unchanged at init"),
        ("expect same_output(at = fold) within 1e-5", "folded = unfolded"),
    ],
)
def test_same_output_is_measured(here: Path, lines: str, claim: str) -> None:
    fold = "fold all on layers[*].**\n" if "fold" in lines else ""
    write("a.surg", f"surg 1\nadapt pissa(rank = 4) on layers[*].attn.q\n{fold}{lines}\n")
    ran = surgery("compile", "a.surg", model("bert"), "--format", "json")
    assert ran.code == 0, ran.out
    found = {c["claim"]: c for c in ran.json["certificates"]}
    assert found[claim]["ok"] and 0 < found[claim]["max_abs_error"] <= found[claim]["tolerance"]
    # it is a measurement: the same claim below what was measured fails, with both numbers
    tight = lines.replace("within 1e-6", "within 1e-12").replace("within 1e-5", "within 1e-12")
    write("a.surg", f"surg 1\nadapt pissa(rank = 4) on layers[*].attn.q\n{fold}{tight}\n")
    ran = surgery("compile", "a.surg", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0602"])
    assert "largest difference" in ran.err and "allowed 1e-12" in ran.err


CHAIN = """surg 1
adapt pissa(rank = 4) on layers[*].attn.q
fold all on layers[*].attn.q
insert bottleneck(width = 4, init = bert) after layers[*].ffn
adapt pissa(rank = 4) on layers[*].attn.v
fold all on layers[*].attn.v
"""


def test_each_fold_is_compared_with_what_stood_right_before_it(here: Path) -> None:
    """A change by design between two folds and one behind them are not the folds' doing; a fold that is off still fails."""
    write("a.surg", CHAIN + "expect same_output(at = fold) within 1e-5\ninsert bottleneck(width = 4, init = bert) after layers[*].attn\n")
    ran = surgery("compile", "a.surg", model("bert"), "--format", "json")
    assert ran.code == 0, ran.out
    found = [c for c in ran.json["certificates"] if c["claim"] == "folded = unfolded"]
    assert len(found) == 2 and all(0 < c["max_abs_error"] <= 1e-5 for c in found)
    expected = ran.json["plan"]["expect"][0]
    assert expected["value"] == max(c["max_abs_error"] for c in found)
    write("a.surg", CHAIN + "expect same_output(at = init) within 1e-5\n")
    assert surgery("compile", "a.surg", model("bert")).codes == ["S0602"], "from the base to the end a change by design shows"
    write("a.surg", CHAIN + "expect same_output(at = fold) within 1e-12\n")
    ran = surgery("compile", "a.surg", model("bert"))
    assert ran.codes == ["S0602"] and "the worst of 2 folds" in ran.err


def test_a_fold_that_is_not_there_is_no_claim(here: Path) -> None:
    write("a.surg", LORA + "expect same_output(at = fold)\nfold all\n")
    assert surgery("check", "a.surg").codes == ["S0240"]


def test_runs_says_where_it_stops(here: Path) -> None:
    """The tiny model has 64 positions."""
    write("a.surg", LORA + "expect runs(batch = 3, length = 64)\n")
    assert surgery("compile", "a.surg", model("bert")).code == 0
    write("a.surg", LORA + "expect runs(batch = 2, length = 65)\n")
    ran = surgery("compile", "a.surg", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0602"])
    assert "fails at batch 2, length 65" in ran.err


def test_locked(here: Path) -> None:
    """The first compile writes the lock, the next one holds the spec to it."""
    write("a.surg", LORA + "expect locked\n")
    first = surgery("compile", "a.surg", model("bert"))
    assert first.code == 0 and "there is no a.surg.lock yet" in first.err
    second = surgery("compile", "a.surg", model("bert"))
    assert second.code == 0 and "as locked" in second.err
    write("a.surg", LORA.replace("{q, v}", "{q, k}") + "expect locked\n")
    third = surgery("compile", "a.surg", model("bert"))
    assert (third.code, third.codes) == (1, ["S0602"])
    assert "sites of `0: adapt lora`: no longer layers[0].attn.v" in third.err and "now also layers[0].attn.k" in third.err


@pytest.mark.parametrize("choice", ["residual = false", "init = bert"])
def test_a_branch_that_changes_the_model_by_choice_promises_nothing(here: Path, choice: str) -> None:
    write("a.surg", f'surg 1\n\ninsert bottleneck(width = 4, {choice}) after layers[*].attn\nemit torch to "out"\n')
    ran = surgery("compile", "a.surg", model("bert"))
    assert ran.code == 0
    assert "changes by design; folds: gemm" in surgery("plan", "a.surg", model("bert")).out
