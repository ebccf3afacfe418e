"""Calibration data from files: what is read, chosen, padded, hashed, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.core.lock import read_lock
from surgery.driver import load_spec
from surgery.model.checkpoint import open_checkpoint
from surgery.model.data import Batch, Samples
from surgery.model.data_open import Shelf
from surgery.model.data_text import load_tokenizer, longest
from surgery.model.losses import IGNORED
from surgery.model.program import Program
from surgery.opening import capture
from tests.captured_programs import live_model, zoo_program
from tests.data_support import WORDS, codes, sentence, spec, text_model, write_lines, write_tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model("bert", tmp_path_factory.mktemp("models"))


def opened(folder: Path, source: str, program: Program, checkpoint: Any = None) -> Samples:
    """The samples of ``data text = SOURCE`` in a spec of ``folder``."""
    path = folder / "spec.surg"
    path.write_text(spec(f"data text = {source}"), "utf-8")
    return Shelf(load_spec(path).data, checkpoint).open("text", program)


def ids_of(samples: Samples) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in samples.rows]


def encoded(text: str) -> list[int]:
    return [2, *(WORDS.index(w) for w in text.split()), 3]


# ---------------------------------------------------------------- text


def test_lines_are_the_models_own_tokens(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    (tmp_path / "a.txt").write_text("\ufeffw5 w6\n\n   \nw7 w8 w9\r\nnothing known\n", "utf-8")
    samples = opened(tmp_path, 'lines("a.txt", seed = 4)', program, open_checkpoint(str(bert)))
    assert sorted(ids_of(samples)) == sorted([encoded("w5 w6"), encoded("w7 w8 w9"), [2, 1, 1, 3]])
    cut = opened(tmp_path, 'lines("a.txt", length = 4)', program, open_checkpoint(str(bert)))
    assert max(len(row) for row in ids_of(cut)) == 4


def test_a_field_of_json_lines(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": f"w{i}"}) + "\n" for i in range(5, 8)), "utf-8")
    (tmp_path / "b.jsonl").write_text('{"sentence": "w9"}\n{"sentence": " "}\n', "utf-8")
    checkpoint = open_checkpoint(str(bert))
    assert sorted(ids_of(opened(tmp_path, 'jsonl("a.jsonl")', program, checkpoint))) == [encoded(f"w{i}") for i in range(5, 8)]
    assert ids_of(opened(tmp_path, 'jsonl("b.jsonl", field = "sentence")', program, checkpoint)) == [encoded("w9")]


def test_the_choice_is_seeded_and_fits_the_smaller_one(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    checkpoint = open_checkpoint(str(bert))
    write_lines(tmp_path / "a.txt", 20)
    every = [encoded(sentence(3 + i % 7, i)) for i in range(20)]
    some, again, other, more = (
        ids_of(opened(tmp_path, f'lines("a.txt", samples = {n}, seed = {seed})', program, checkpoint))
        for n, seed in ((6, 1), (6, 1), (6, 2), (9, 1))
    )
    assert some == again != other and more[:6] == some and all(s in every for s in some) and len(some) == 6
    assert sorted(ids_of(opened(tmp_path, 'lines("a.txt")', program, checkpoint))) == sorted(every)


def test_the_digest_is_of_the_samples(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    checkpoint = open_checkpoint(str(bert))
    write_lines(tmp_path / "a.txt", 20)

    def digest(more: str) -> str:
        return opened(tmp_path, f'lines("a.txt", samples = 6{more})', program, checkpoint).digest

    first = digest("")
    assert first == digest(", batch = 3") and len({first, digest(", seed = 1"), digest(", length = 4")}) == 3
    (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text("utf-8").replace("w", "w1"), "utf-8")
    assert digest("") != first


def test_batches_are_padded_on_the_right_and_say_so(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    rows = [{"input_ids": torch.arange(5, 5 + n)} for n in (2, 5, 3)]
    first, second = Samples(rows, batch=2, pad=7).batches(program)
    names = program.signature.parameters
    given = dict(zip(names, first.inputs, strict=True))
    assert given["input_ids"].tolist() == [[5, 6, 7, 7, 7], [5, 6, 7, 8, 9]]
    assert given["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]] and given["token_type_ids"].eq(0).all()
    assert first.keep is not None and torch.equal(first.keep, given["attention_mask"].bool())
    assert (first.first, first.rows, second.first, second.rows) == (0, 2, 2, 1)


def test_a_causal_model_gets_an_empty_cache_positions_and_its_own_labels() -> None:
    for family in ("gpt2", "llama"):
        program, _ = zoo_program(family)
        (batch,) = Samples([{"input_ids": torch.arange(5, 8)}, {"input_ids": torch.arange(5, 10)}]).batches(program)
        assert batch.labels["labels"].tolist() == [[5, 6, 7, IGNORED, IGNORED], [5, 6, 7, 8, 9]]
        caches = [t for t in batch.inputs if t.ndim == 4]
        assert len(caches) == 6 and all(t.shape[:1] + t.shape[2:3] == (2, 0) for t in caches)


def test_text_to_text_models_read_the_text_on_both_sides() -> None:
    program, _ = zoo_program("t5")
    (batch,) = Samples([{"input_ids": torch.arange(5, 8)}, {"input_ids": torch.arange(5, 10)}]).batches(program)
    given = dict(zip(program.signature.parameters, batch.inputs, strict=True))
    assert given["decoder_input_ids"].tolist() == [[0, 5, 6, 7, 0], [0, 5, 6, 7, 8]]
    assert given["decoder_attention_mask"].tolist() == given["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert len(batch.masks) == 2


def test_default_and_largest_length_are_what_the_model_has_positions_for(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    (tmp_path / "a.txt").write_text(" ".join(["w5"] * 300), "utf-8")
    checkpoint = open_checkpoint(str(bert))
    assert longest(program) == 64 and longest(zoo_program("t5")[0]) > 10**6
    # positions of RoBERTa are counted from the padding id on: 64 rows hold 62 tokens
    roberta, _ = zoo_program("roberta")
    assert longest(roberta) == 62
    with torch.no_grad():
        live_model("roberta")(input_ids=torch.full((1, 62), 5))
        with pytest.raises((IndexError, RuntimeError)):
            live_model("roberta")(input_ids=torch.full((1, 63), 5))
    assert len(ids_of(opened(tmp_path, 'lines("a.txt")', program, checkpoint))[0]) == 64
    with pytest.raises(SurgeryError) as error:
        opened(tmp_path, 'lines("a.txt", length = 65)', program, checkpoint)
    assert codes(error) == ["S0756"]


def test_the_demo_model_brings_its_tokenizer() -> None:
    tokenizer = load_tokenizer(open_checkpoint("minilm"), None)  # type: ignore[arg-type]
    assert tokenizer.encode("Hello world.", 512) == [101, 7592, 2088, 1012, 102] and tokenizer.pad == 0
    assert tokenizer.encode("Hello world.", 3) == [101, 7592, 102]


def test_a_tokenizer_that_names_code_of_its_own_runs_none(tmp_path: Path) -> None:
    """The class it names does not exist here; its tokenizer.json is data and is read."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["code.Strange", None]}}), "utf-8"
    )
    (tmp_path / "code.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n", "utf-8")

    class Folder:
        path, tokenizer_files = tmp_path, (tmp_path / "tokenizer.json",)

    assert load_tokenizer(Folder(), None).encode("w5 w6", 9) == encoded("w5 w6")  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- tensors


def tensors(folder: Path, program: Program, given: dict[str, torch.Tensor], more: str = "") -> Samples:
    save_file(given, folder / "in.safetensors")
    return opened(folder, f'tensors("in.safetensors"{more})', program)


def test_tensors_are_chosen_and_keep_their_masks(tmp_path: Path) -> None:
    program, _ = zoo_program("bert")
    ids = torch.arange(4, 44).reshape(8, 5)
    mask = torch.ones(8, 5, dtype=torch.int32)
    mask[:, :2] = 0
    samples = tensors(tmp_path, program, {"input_ids": ids, "attention_mask": mask}, ", samples = 3, batch = 2, seed = 1")
    batches: list[Batch] = list(samples)
    assert [b.rows for b in batches] == [2, 1] and batches[0].keep is not None
    assert batches[0].keep.tolist() == [[False, False, True, True, True]] * 2
    assert all(row in ids.tolist() for row in ids_of(samples)) and batches[0].inputs[1].dtype == torch.int64


def test_images_and_labels(tmp_path: Path) -> None:
    program, _ = zoo_program("vit")
    (batch,) = tensors(tmp_path, program, {"pixel_values": torch.rand(2, 3, 16, 16).to(torch.bfloat16)})
    assert batch.inputs[0].dtype == torch.float32 and batch.keep is None and not batch.labels
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**{**live_model("bert").config.to_dict(), "num_labels": 3})).eval()  # type: ignore[operator,union-attr]
    ids = torch.arange(4, 14).reshape(2, 5)
    classifier = capture(model, {"input_ids": ids})
    (batch,) = tensors(tmp_path, classifier, {"input_ids": ids, "labels": torch.tensor([2, 0])})
    assert sorted(batch.labels["labels"].tolist()) == [0, 2]
    from surgery.model.live import Tensors, live_root
    from surgery.model.realise import no_functions
    from surgery.model.study_loss import Objective

    root = live_root(classifier, Tensors(no_functions), dtype=torch.float32).eval()
    with torch.no_grad():
        got = Objective(classifier).losses(root(*batch.inputs), batch)
        want = model(input_ids=batch.inputs[0], labels=batch.labels["labels"]).loss
    assert len(got) == 2 and abs(float(sum(got) / 2 - want)) < 1e-6


IDS = torch.ones(4, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"ids": IDS}, "S0746"),
        ({"token_type_ids": IDS}, "S0746"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 6, dtype=torch.int64)}, "S0747"),
        ({"input_ids": IDS, "attention_mask": torch.ones(4, 7, dtype=torch.int64)}, "S0747"),
        ({"input_ids": IDS[0]}, "S0747"),
        ({"input_ids": IDS.float()}, "S0747"),
        ({"input_ids": IDS[:0]}, "S0741"),
        ({"input_ids": IDS * 99}, "S0749"),
        ({"input_ids": IDS * -1}, "S0749"),
        ({}, "S0746"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, given: dict[str, torch.Tensor], code: str) -> None:
    with pytest.raises(SurgeryError) as error:
        tensors(tmp_path, zoo_program("bert")[0], given)
    assert codes(error) == [code]


def test_floating_inputs_must_be_finite_and_of_the_right_size(tmp_path: Path) -> None:
    program, _ = zoo_program("vit")
    for bad in (torch.full((2, 3, 16, 16), float("nan")), torch.ones(2, 3, 16, 8), torch.ones(2, 3, 16, 16, dtype=torch.int64)):
        with pytest.raises(SurgeryError) as error:
            tensors(tmp_path, program, {"pixel_values": bad})
        assert codes(error) == ["S0747"]


def test_files_that_cannot_be_read(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    checkpoint = open_checkpoint(str(bert))
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.jsonl").write_text("[1]\n", "utf-8")
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n', "utf-8")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n", "utf-8")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0")
    wanted = {
        'lines("none.txt")': "S0740", 'lines("folder")': "S0740", 'tensors("none.safetensors")': "S0740", 'tensors("folder")': "S0740",
        'jsonl("list.jsonl")': "S0744", 'jsonl("number.jsonl")': "S0744", 'jsonl("deep.jsonl")': "S0744",
        'tensors("torn.safetensors")': "S0745",
    }  # fmt: skip
    for source, code in wanted.items():
        with pytest.raises(SurgeryError) as error:
            opened(tmp_path, source, program, checkpoint)
        assert codes(error) == [code], source


def test_a_tokenizer_of_another_model(tmp_path: Path, bert: Path) -> None:
    program, _ = zoo_program("bert")
    write_tokenizer(tmp_path, (*WORDS, "w99"))
    (tmp_path / "a.txt").write_text("w99\n", "utf-8")

    class Folder:
        path, tokenizer_files = tmp_path, (tmp_path / "tokenizer.json",)

    with pytest.raises(SurgeryError) as error:
        opened(tmp_path, 'lines("a.txt")', program, Folder())
    assert codes(error) == ["S0749"]
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(SurgeryError) as error:
        opened(tmp_path, 'lines("a.txt")', program, Folder())
    assert codes(error) == ["S0748"]


# ---------------------------------------------------------------- in specs

MASK = 'prune mask(pattern = "2:4", score = wanda) on layers[*].ffn.{up, down} using text'


def test_data_is_looked_at_already_in_plan_and_only_where_it_is_used(tmp_path: Path, bert: Path) -> None:
    path = tmp_path / "a.surg"
    path.write_text(spec('data text = lines("none.txt")', MASK), "utf-8")
    found = surgery.plan(path, str(bert)).diagnostics
    assert [d.code for d in found if d.is_error] == ["S0740"]
    path.write_text(spec('data text = lines("none.txt")', "freeze all on layers[0].**"), "utf-8")
    assert surgery.plan(path, str(bert)).ok


def test_choosing_data_by_a_method_is_not_there_yet(tmp_path: Path, bert: Path) -> None:
    text = spec('data text = lines("a.txt") select zipfit(target = "b.txt")', MASK)
    found = surgery.check(text)
    assert [d.code for d in found] == ["S0211"] and "this version has no method for this verb yet" in found[0].message


def test_the_lock_holds_the_data_and_drift_is_told(tmp_path: Path, bert: Path) -> None:
    path, data = tmp_path / "a.surg", write_lines(tmp_path / "calib.txt", 8)
    path.write_text(spec('data text = lines("calib.txt", samples = 4)', MASK), "utf-8")
    surgery.compile(path, str(bert), out=tmp_path)
    lock = read_lock(tmp_path / "a.surg.lock")
    assert list(lock.data) == ["text"] and len(lock.data["text"]) == 64
    surgery.compile(path, str(bert), out=tmp_path, locked=True)
    data.write_text(data.read_text("utf-8").replace("w", "w1").replace("w1w1", "w1"), "utf-8")
    with pytest.raises(SurgeryError) as error:
        surgery.compile(path, str(bert), out=tmp_path, locked=True)
    assert codes(error) == ["S0407"] and any(n.startswith("data `text`") for d in error.value.diagnostics for n in d.notes)
