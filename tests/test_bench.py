"""``surgery bench``: what is measured, how it is compared, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.benching import bench, difference
from surgery.benching_arms import EAGER, PLAIN, sort_of
from surgery.benching_feeds import Input, arrays, axis, merged
from surgery.benching_ideal import Ideal, fit, generate
from surgery.benching_numbers import names, numbers
from surgery.benching_turns import take_turns, timing
from surgery.cli.main import main
from surgery.core.diagnostics import SurgeryError
from tests.programs import LM, live

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM)).save_pretrained(folder / "llama")
    return folder


# ------------------------------------------------------------------ idealised runtime


def test_the_published_example() -> None:
    """A model of 12,288 wide and 96 layers: F(128) = 0.094 s, g = 0.081 s; 100 tokens in and 50 out take 4.0424 s."""
    ideal = Ideal({1: 0.082, 128: 0.094, 256: 0.15}, 0.081)
    assert ideal.runtime(100, 50) == pytest.approx(0.094 * 100 / 128 + 0.081 * 49) == pytest.approx(4.0424, abs=5e-5)
    assert ideal.runtime(128, 1) == ideal.runtime(128, 0) == 0.094
    assert ideal.runtime(512) == pytest.approx(0.30), "beyond the table the last entry is scaled"
    with pytest.raises(ValueError, match="encoder"):
        Ideal({1: 0.1}).runtime(1, 2)


def test_the_fit_finds_what_the_runs_were_made_of() -> None:
    table = {1: 0.01, 16: 0.02, 128: 0.05}
    runs = [(p, o, f + 0.007 * (o - 1)) for p, f in table.items() for o in (1, 2, 4, 8)]
    found = fit(runs)
    assert dict(found.table) == table and found.step == pytest.approx(0.007) and found.r2 == pytest.approx(1.0)
    assert all(found.runtime(p, o + 1) > found.runtime(p, o) for p in table for o in (1, 2, 7))
    noisy = fit([(p, o, t + 0.002 * (-1) ** o * (o > 1)) for p, o, t in runs])
    assert noisy.r2 is not None and noisy.r2 < 1.0
    assert fit([(1, 1, 0.1), (1, 1, 0.3), (1, 1, 0.2)]) == Ideal({1: 0.2}), "medians, and no slope without further tokens"


# ------------------------------------------------------------------ turns


def test_arms_take_turns_and_every_timed_run_follows_one_that_is_not() -> None:
    ran: list[str] = []
    now = [0.0]

    def arm(name: str, seconds: float) -> Any:
        def run() -> None:
            ran.append(name)
            now[0] += seconds

        return run

    arms = {"a": arm("a", 0.125), "b": arm("b", 0.0625), "c": arm("c", 3.0)}
    found = take_turns(arms, 3, clock=lambda: now[0], pause=0.0)
    assert "".join(ran) == "abc" + "aabbc" + "cbbaa" + "aabbc", "a long run needs none before it"
    assert (found["a"].median, found["b"].median, found["c"].median, found["a"].rounds) == (0.125, 0.0625, 3.0, 3)
    spread = timing([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.low, spread.median, spread.high, spread.spread) == (2.0, 3.0, 4.0, pytest.approx(2 / 3))


# ------------------------------------------------------------------ inputs


def test_inputs_have_the_sizes_that_were_asked_for() -> None:
    listed = [
        Input("input_ids", "int64", ("batch", "sequence"), 50), Input("attention_mask", "int64", ("batch", "past+sequence")),
        Input("past_key_values.0.key", "float32", ("batch", 2, "past", 8)), Input("position_ids", "int64", ("batch", "sequence")),
    ]  # fmt: skip
    made = arrays(listed, 3, 5, past=4)
    assert [made[i.name].shape for i in listed] == [(3, 5), (3, 9), (3, 2, 4, 8), (3, 5)]
    assert made["position_ids"][2].tolist() == [4, 5, 6, 7, 8] and made["attention_mask"].all()
    assert 3 <= made["input_ids"].min() and made["input_ids"].max() < 50
    assert np.array_equal(made["input_ids"], arrays(listed, 3, 5, past=4)["input_ids"])
    assert axis("2*sequence+1", {"sequence": 5}) == 11
    with pytest.raises(SurgeryError, match="S0898"):
        axis("frames", {"batch": 1})
    smaller = Input("input_ids", "int64", ("batch", "sequence"), 20)
    assert merged([listed[:1], [smaller]])[0].below == 20


def test_a_difference_is_that_of_the_first_output_in_common() -> None:
    a, b = np.zeros((2, 3)), np.full((2, 3), 0.5)
    assert difference({"x": a, "logits": a}, {"logits": torch.from_numpy(b)}) == 0.5
    assert difference({"x": a}, {"x": np.zeros((2, 4))}) is None and difference({"present.0.key": a}, {"present.0.key": b}) is None


def test_numbers_of_the_command_line() -> None:
    assert numbers("1, 8,8,2", "batch") == [1, 8, 2] and names("plain,eager,plain") == ["plain", "eager"] and names("none") == []
    for text in ("0", "-1", "many", "1,", "99999999"):
        with pytest.raises(SurgeryError) as found:
            numbers(text, "batch")
        assert found.value.diagnostics[0].code == "S0899" and found.value.exit_code == 2


# ------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def benched(models: Path) -> Any:
    return bench(
        [str(models / "llama")], batches=[1, 3], lengths=[4, 9], rounds=2, prompts=[1, 8, 62], outputs=[1, 3], memory=False, threads=1
    )


def test_every_arm_is_measured_at_every_shape(benched: Any, models: Path) -> None:
    from surgery.model import cost
    from surgery.opening import open_program

    program, _ = open_program(str(models / "llama"))
    assert list(benched.cells) == [(1, 4), (1, 9), (3, 4), (3, 9)]
    for (batch, length), cells in benched.cells.items():
        eager, plain = cells.values()
        assert eager.error is None and plain.error is not None and plain.error < 1e-5
        assert eager.flops == plain.flops == batch * cost.count(program, length).total
        assert eager.timing.median > 0 and eager.rate == eager.flops / eager.timing.median
    assert all(set(i.table) == {1, 8} and i.step is not None for i in benched.ideal.values())
    assert benched.left_out == {"prompt of 62": "the models take up to 64 tokens"}


def test_what_is_measured_is_shown(benched: Any) -> None:
    shown, text = benched.as_json(), benched.render_text()
    assert shown["schema"] == "surgery.bench/1" and json.loads(json.dumps(shown)) == shown
    for shape in shown["shapes"]:
        times = {a["name"]: a["median_ms"] for a in shape["arms"]}
        assert shape["best"] == min(times, key=times.get)  # type: ignore[arg-type]
        assert shape["best_artifact"].endswith("[torch eager]")
    assert "batch 3, length 9" in text and "best artifact:" in text and "F(8)" in text and "prompt of 62" in text


def test_a_file_of_another_origin_runs_too(tmp_path: Path) -> None:
    """An ONNX graph without any word of ours: inputs from the graph, sizes from its weights, no predicted operations."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = numpy_helper.from_array(np.ones((10, 4), np.float32), "table")
    for name, ids in (("g", "input_ids"), ("h", "codes")):
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", ids], ["y"])], name,
            [helper.make_tensor_value_info(ids, TensorProto.INT64, ["batch", "sequence"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 4])], [table],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / f"{name}.onnx")
    found = bench([str(tmp_path / "g.onnx")], batches=[2], lengths=[5], rounds=1, prompts=[], threads=1)
    (arm,) = found.arms
    (cell,) = found.cells[2, 5].values()
    assert arm.inputs == (Input("input_ids", "int64", ("batch", "sequence"), 10),) and arm.record["bytes"] == 160
    assert cell.flops is None and cell.rate is None
    assert 20 < found.memory[arm.name] < 150 and not found.left_out, "a process of its own, without torch"
    with pytest.raises(SurgeryError, match="have no input in common") as wrong:
        bench([str(tmp_path / "g.onnx")], str(tmp_path / "h.onnx"), rounds=1, prompts=[], threads=1)
    assert wrong.value.diagnostics[0].code == "S0898"


def test_tokens_of_an_arm_are_those_of_generate(benched: Any, models: Path) -> None:
    """Through the cache, by eager torch and by onnxruntime."""
    assert [a.kind for a in benched.arms] == [EAGER, PLAIN]
    ids = torch.from_numpy(arrays(benched.arms[0].inputs, 1, 5)["input_ids"])
    model = LlamaForCausalLM.from_pretrained(models / "llama")
    want = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:].tolist()
    for arm in benched.arms:
        assert generate(arm.prepare, arm.inputs, 5, 6) == want


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["missing.onnx"], "S0895", "no such file"),
        (["folder.onnx"], "S0895", "it is a folder"),
        (["empty"], "S0895", "neither surgery.json nor config.json"),
        (["notes.txt"], "S0895", "a file of another kind"),
        (["broken.onnx"], "S0895", "onnxruntime refuses it"),
        (["broken.pt2"], "S0897", "did not write it"),
        (["missing/model"], "S0895", "no such file or folder"),
        (["broken.onnx", "--rounds", "0"], "S0899", "rounds"),
        (["broken.onnx", "--threads", "two"], "S0899", "not a number"),
        (["broken.onnx", "--against", "nowhere/at/all"], "S0895", "no such file or folder"),
        ([], "S0911", "ARTIFACTS"),
    ],
)
def test_what_cannot_be_benched_is_said(
    words: list[str], code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "broken.onnx", "broken.pt2"):
        (tmp_path / name).write_text("nothing to run")
    before = sorted(tmp_path.iterdir())
    assert main(["bench", *words]) == 2
    told = capsys.readouterr()
    assert f"[{code}]" in told.err and said in told.err and "Traceback" not in told.err and not told.out
    assert sorted(tmp_path.iterdir()) == before


def test_everything_is_looked_at_before_anything_is_opened(tmp_path: Path, models: Path) -> None:
    with pytest.raises(SurgeryError) as found:
        bench([str(models / "llama"), str(tmp_path / "no.onnx")])
    assert found.value.diagnostics[0].code == "S0895"
    assert sort_of(str(models / "llama")) == "module" and sort_of("minilm") == "module"


def test_longer_than_the_model_takes(models: Path) -> None:
    with pytest.raises(SurgeryError) as found:
        bench([str(models / "llama")], lengths=[16, 65], arms=[EAGER], prompts=[], memory=False)
    assert found.value.diagnostics[0].code == "S0896" and "64 tokens, not 65" in found.value.diagnostics[0].message


# ------------------------------------------------------------------ what compile says


def test_compile_says_which_output_is_faster_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line over the usual shapes that the model takes; shapes that would take long are left out; other failures are said."""
    from surgery import benching_verdict
    from surgery.backends import aoti
    from surgery.benching import Benched, Cell
    from surgery.benching_arms import ONNX, PT2, Arm
    from surgery.benching_turns import Timing

    record = {"longest": 100, "inputs": [{"shape": ["batch", "sequence"]}], "cost": [[1, 1e6], [50, 5e7], [100, 1e8]]}
    arms = [Arm("b/m.onnx", ONNX, (), lambda feeds: lambda: {}), Arm("b/m.pt2", PT2, (), lambda feeds: lambda: {})]

    def bench(paths: list[str], *, batches: list[int], lengths: list[int], **more: Any) -> Benched:
        assert paths == ["b/m.onnx", "b/m.pt2"] and more["arms"] == []
        shape = batches[0], lengths[0]
        fast = arms[1 if shape == (8, 100) else 0]
        cells = {a.name: Cell(Timing(1.0 if a is fast else 2.0, 1.0, 2.0, 5)) for a in arms}
        return Benched(arms, [shape], 2, 5, paths, {shape: cells})

    monkeypatch.setattr(aoti, "read_record", lambda path: record)
    monkeypatch.setattr(benching_verdict, "bench", bench)
    files = [Path("b/m.onnx"), Path("b/m.pt2"), Path("b/module")]
    (said,) = benching_verdict.verdict(files)
    assert said == "faster at (batch, length), measured with 2 threads: m.onnx at (1, 16), (1, 100), (8, 16); m.pt2 at (8, 100)"
    assert benching_verdict.verdict(files[:1]) == [] == benching_verdict.verdict([])
    monkeypatch.setattr(benching_verdict, "MOST_OPERATIONS", 2e7)
    assert benching_verdict.verdict(files)[0].endswith("m.onnx at (1, 16)")
    monkeypatch.setattr(benching_verdict, "MOST_OPERATIONS", 1.0)
    assert "too large" in benching_verdict.verdict(files)[0]
