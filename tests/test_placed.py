"""Tensors that are put in their places by those who make them: the same files, from the same parts, and nothing left behind when something fails."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery as api
from surgery.core.diagnostics import SurgeryError
from surgery.model import flows, pieces, placed, running, writer
from surgery.model.checkpoint_headers import read_header
from surgery.model.flows import Parts
from surgery.model.realise import Realiser, realise
from surgery.model.shards import write_safetensors
from surgery.model.streams import stream_of
from surgery.model.weights import Apply, Expr, Scale, select
from surgery.passes import registry
from surgery.passes.kinds import blocks, merge_math
from tests.driver_support import checkpoint
from tests.test_fold_blocks import fold_of

SHAPE = (90, 70)
MERGES: dict[str, dict[str, Any]] = {
    "linear": {}, "slerp": {"t": 0.3}, "task_arithmetic": {"scale": 0.7}, "dare": {"density": 0.4, "rescale": "l1"},
    "ties": {"density": 0.5, "trim": "tensor"},
}  # fmt: skip
COMPUTED = {"fold", "fold wide", *MERGES}


@pytest.fixture
def exprs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Expr]:
    monkeypatch.setattr(pieces, "SMALL", 0)
    monkeypatch.setattr(blocks, "BLOCK", 16 * 70)
    monkeypatch.setattr(merge_math, "CHUNK", 700)
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(SHAPE, generator=generator).bfloat16() for n in ("base", "one", "two")}
    values |= {"wide": torch.randn(SHAPE, generator=generator), "odd": values["one"].clone()}
    values["odd"][80, 3] = float("nan")
    save_file(values, tmp_path / "in.safetensors")
    loads: dict[str, Expr] = {n: h.load() for n, h in read_header(tmp_path / "in.safetensors").tensors.items()}
    out: dict[str, Expr] = {n: loads[n] for n in ("one", "wide")}
    out["rows"] = select(loads["two"], 0, ((1, 50), (60, 61)))
    out["half"] = Scale(SHAPE, "bfloat16", loads["one"], 0.5)
    out["fold"], out["fold wide"] = fold_of(loads["one"]), fold_of(loads["wide"])
    out |= {name: merge_of(loads, name) for name in MERGES}
    out["odd"] = loads["odd"]
    return out


def merge_of(loads: dict[str, Expr], name: str, last: str = "two") -> Apply:
    names = ("base", "one", last) if registry.get("merge", name).reads_base else ("one", last)  # type: ignore[attr-defined]
    params: dict[str, Any] = {"weights": (1.0, 0.5), "seed": 3, "tensor": "w", "of": names, **MERGES[name]}
    if names[0] != "base":
        params["dtype"] = "bfloat16"
    return Apply(SHAPE, "bfloat16", f"merge/{name}:merged", tuple(loads[n] for n in names), tuple(params.items()))


def write(folder: Path, exprs: dict[str, Expr], asked: list[str] | None = None, **options: Any) -> Any:
    folder.mkdir()
    made = Realiser(exprs, registry.function)

    def parts(name: str, files: ExitStack) -> Parts | None:
        found = made.parts(name, files)
        if found is not None and asked is not None:
            asked.append(name)
        return found

    return write_safetensors(
        folder, {n: (lambda n=n: made[n]) for n in exprs}, {n: e.shape for n, e in exprs.items()}, {n: e.dtype for n, e in exprs.items()},
        max_shard_bytes=40_000, streams={n: s for n, e in exprs.items() if (s := stream_of(e)) is not None}, checking=True, parts=parts, **options,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block", [1200, 1 << 20])
def test_files_are_those_that_are_filled_in_order(
    exprs: dict[str, Expr], tmp_path: Path, workers: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in which nothing fits as a whole, and blocks for everything; windows of storing that end anywhere."""
    plain = write(tmp_path / "plain", exprs, hashing=True)
    monkeypatch.setattr(placed, "BLOCK", block)
    for name, size in (("LOOK", 700), ("WINDOW", 9000)):
        monkeypatch.setattr(writer, name, size)
    asked: list[str] = []
    told: list[str] = []
    before, handles = threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    there = write(tmp_path / "placed", exprs, asked, workers=workers, progress=lambda name, size: told.append(name))
    assert sorted(asked) == sorted(COMPUTED) and told == list(exprs)
    assert len(plain.files) > 4 and [p.name for p in there.files] == [p.name for p in plain.files]
    for one, other in zip(plain.files, there.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), other.name
    stored = {n: h.load() for p in there.files[:-1] for n, h in read_header(p).tensors.items()}
    monkeypatch.setattr(pieces, "SMALL", 1 << 30)  # what was computed in parts is what whole tensors give
    for name in COMPUTED:
        assert torch.equal(realise(stored[name]), realise(exprs[name], functions=registry.function)), name
    assert there.checked == {p: p.stat().st_size for p in there.files if p.suffix == ".safetensors"} and not there.digests
    assert threading.active_count() == before and (not handles or len(os.listdir("/proc/self/fd")) == handles)


def test_what_several_outputs_need_is_not_computed_in_parts(exprs: dict[str, Expr], tmp_path: Path) -> None:
    both = {"a": exprs["fold"], "b": exprs["fold"], "c": exprs["slerp"]}
    asked: list[str] = []
    write(tmp_path / "out", both, asked, workers=2)
    assert asked == ["c"]


@pytest.mark.parametrize("name", MERGES)
def test_elements_that_are_not_finite_are_told_as_of_a_whole(exprs: dict[str, Expr], tmp_path: Path, name: str) -> None:
    loads = {n: h.load() for n, h in read_header(tmp_path / "in.safetensors").tensors.items()}
    bad: dict[str, Expr] = {"one": loads["one"], "w": merge_of(dict(loads), name, "odd"), "two": loads["two"]}
    before = threading.active_count()
    messages = []
    for workers in (0, 2):
        with pytest.raises(SurgeryError) as caught:
            write(tmp_path / f"out{workers}", bad, workers=workers)
        messages.append(caught.value.diagnostics[0])
    assert messages[0] == messages[1] and messages[0].code == "S0798" and "`w` of odd is not finite" in messages[0].message
    assert threading.active_count() == before


def test_a_checkpoint_that_became_shorter_is_a_diagnostic(exprs: dict[str, Expr], tmp_path: Path) -> None:
    os.truncate(tmp_path / "in.safetensors", 20_000)
    before = threading.active_count()
    with pytest.raises(SurgeryError) as caught:
        write(tmp_path / "out", {n: exprs[n] for n in ("slerp", "fold", "linear")}, workers=2)
    assert caught.value.diagnostics[0].code == "S0721" and threading.active_count() == before


def test_only_files_of_their_own_are_filled_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "pipe").symlink_to(os.devnull)
    assert placed.placeable([tmp_path / "there", tmp_path / "new"]) and not placed.placeable([tmp_path / "pipe"])


def test_a_large_model_is_folded_and_merged_in_parts_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From spec to checkpoint: a model that counts as large is written as the small one is, and its weights came in parts."""
    monkeypatch.chdir(tmp_path)
    source = checkpoint("llama")
    spec = 'surg 1\ncheckpoint two = load("{}")\nmerge slerp(t = 0.25) of two, two\nadapt lora(rank = 2, seed = 3) on layers[*].attn.q\nemit transformers to "{}"\n'
    monkeypatch.setattr(pieces, "SMALL", 0)
    seen: list[int] = []
    true = flows.parts_of

    def noted(function: Any, args: Any, params: Any) -> Parts | None:
        found = true(function, args, params)
        seen.append(found is not None)
        return found

    monkeypatch.setattr("surgery.model.realise.parts_of", noted)
    api.compile(spec.format(source, "small"), source)
    assert not seen
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    done = api.compile(spec.format(source, "large"), source)
    assert sum(seen) > 10
    assert Path("large/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()
    assert done.certificates[-1]["bytes"] == Path("large/model.safetensors").stat().st_size


def test_parts_that_do_not_fill_their_tensor_are_found(tmp_path: Path) -> None:
    """A hole in a file would read as zeros."""
    shapes, dtypes = {"a": (4, 8), "b": (3,)}, {"a": "float32", "b": "float32"}
    tensors = {n: torch.ones(s) for n, s in shapes.items()}
    for short in (torch.ones(31), torch.ones(33)):
        with pytest.raises(ValueError, match="a: promised 128 bytes"):
            write_safetensors(
                tmp_path,
                tensors,
                shapes,
                dtypes,
                workers=2,
                hashing=False,
                parts=lambda name, files, t=short: iter([t]) if name == "a" else None,
            )
