"""Bytes on their way from file to file: streams give what tensors give, what is written is read back, and nothing hangs when something fails."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import surgery as api
from surgery.backends import streaming
from surgery.core.diagnostics import SurgeryError
from surgery.model import artifact, running, samegraph, streams, writer
from surgery.model.checkpoint_headers import read_header
from surgery.model.live import Tensors
from surgery.model.realise import no_functions, realise
from surgery.model.shards import write_safetensors
from surgery.model.streams import Stream, stream_of
from surgery.model.viewed import reshaped
from surgery.model.weights import Concat, Expr, Scale, Stack, select
from surgery.passes.kinds.slice_scores import _Plan, _summed, marginal
from tests.captured_programs import zoo_program
from tests.driver_support import checkpoint

TORN = tuple((i, i + 1 + i % 3) for i in range(0, 396, 4))
"""More ranges than are copied one by one."""


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Expr]:
    generator = torch.Generator().manual_seed(0)
    values = {
        "wide": torch.randn(400, 300, generator=generator).bfloat16(), "long": torch.randn(30, 400, generator=generator),
        "experts": torch.randn(3, 40, 2100, generator=generator).half(), "bias": torch.randn(400, generator=generator).bfloat16(),
        "bytes": torch.arange(400 * 5).reshape(400, 5).to(torch.int8), "one": torch.tensor(3.0),
    }  # fmt: skip
    save_file(values, tmp_path / "in.safetensors")
    return {name: header.load() for name, header in read_header(tmp_path / "in.safetensors").tensors.items()}


def expressions(stored: dict[str, Expr]) -> dict[str, Expr]:
    rows = select(stored["wide"], 0, TORN)
    return {
        **stored,
        "rows": rows,
        "few rows": select(stored["wide"], 0, ((3, 90), (91, 399))),
        "far rows": select(stored["experts"], 1, ((0, 1), (30, 39))),
        "columns": select(stored["long"], 1, TORN),
        "both": select(select(stored["long"], 0, ((1, 5), (6, 29))), 1, TORN),
        "both again": select(select(stored["long"], 1, TORN), 0, ((0, 3),)),
        "turned": select(stored["wide"], 0, ((90, 95), (3, 40), (40, 42))),
        "hidden": select(stored["experts"], 2, ((5, 6), (8, 2100))),
        "short": select(stored["bias"], 0, TORN),
        "chain": Concat((2 * 400, 300), "bfloat16", (stored["wide"], stored["wide"]), 0),
        "stack": Stack((2, *rows.shape), "bfloat16", (rows, rows), 0),
        "unfolded": select(reshaped(stored["wide"], (4, 100, 300)), 0, ((1, 2), (3, 4))),
        "flat": reshaped(select(stored["experts"], 0, ((1, 3),)), (2 * stored["experts"].shape[1], stored["experts"].shape[2])),
    }


def joined(stream: Stream, limit: int) -> bytes:
    pieces = []
    for size, fill in stream.pieces(limit):
        assert 0 < size <= limit
        buffer = memoryview(bytearray(size))
        fill(buffer)
        pieces.append(bytes(buffer))
    sizes = {len(p) for p in pieces[:-1]}
    assert not stream.unit or sizes <= {limit // stream.unit * stream.unit}
    return b"".join(pieces)


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_streams_are_the_bytes_of_the_tensors(stored: dict[str, Expr]) -> None:
    for name, expr in expressions(stored).items():
        stream = stream_of(expr)
        assert stream is not None and (stream.shape, stream.dtype) == (expr.shape, expr.dtype), name
        for limit in (streams.BLOCK, max(2200, stream.unit), max(5003, stream.unit)):
            assert joined(stream, limit) == bits(realise(expr)), (name, limit)


def test_what_must_be_computed_has_no_stream(stored: dict[str, Expr]) -> None:
    wide = stored["wide"]
    assert stream_of(Scale(wide.shape, wide.dtype, wide, 2.0)) is None
    assert stream_of(Concat((400, 600), "bfloat16", (wide, wide), 1)) is None
    assert stream_of(select(select(wide, 0, ((0, 9),)), 0, ((2, 5),))) is None
    assert stream_of(select(stored["long"], 1, TORN), limit=1599) is None  # one row is 1600 bytes
    assert stream_of(select(stored["long"], 1, TORN), limit=1600) is not None


def test_a_file_that_became_shorter_is_a_diagnostic(stored: dict[str, Expr], tmp_path: Path) -> None:
    some = {n: stream_of(expressions(stored)[n]) for n in ("wide", "columns", "rows")}
    os.truncate(tmp_path / "in.safetensors", 2000)
    for stream in some.values():
        assert stream is not None
        with pytest.raises(SurgeryError) as caught:
            joined(stream, streams.BLOCK)
        assert caught.value.diagnostics[0].code == "S0721"


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_the_same_with_and_without_streams(
    stored: dict[str, Expr], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks and windows, so that every path of the writer is taken."""
    for name, size in (("BLOCK", 3000), ("LOOK", 700), ("WINDOW", 9000)):
        monkeypatch.setattr(writer, name, size)
    monkeypatch.setattr("surgery.model.shards.BLOCK", 4096)
    exprs = expressions(stored)
    exprs["twice"] = Scale((400, 300), "bfloat16", stored["wide"], 2.0)
    made: dict[str, Any] = {n: (lambda e=e: realise(e)) for n, e in exprs.items()}
    shapes, dtypes = {n: e.shape for n, e in exprs.items()}, {n: e.dtype for n, e in exprs.items()}
    flowing = {n: s for n, e in exprs.items() if (s := stream_of(e, 4096)) is not None}
    assert "twice" not in flowing and len(flowing) >= len(exprs) - 2
    refused = {n: (lambda n=n: pytest.fail(f"{n} was made")) if n in flowing else made[n] for n in made}
    plain = (
        write_safetensors(tmp_path / "plain", made, shapes, dtypes, max_shard_bytes=700_000)
        if (tmp_path / "plain").mkdir() is None
        else None
    )
    (tmp_path / "flow").mkdir()
    told: list[str] = []
    flow = write_safetensors(
        tmp_path / "flow", refused, shapes, dtypes, max_shard_bytes=700_000, workers=workers, hashing=True, checking=True, streams=flowing,
        soon=told.append,
    )  # fmt: skip
    assert plain is not None and len(plain.files) > 2
    for one, other in zip(plain.files, flow.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    inside = [p for p in flow.files if p.suffix == ".safetensors"]
    assert flow.digests == {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in inside}
    assert flow.checked == {p: p.stat().st_size for p in inside}
    assert set(told) <= set(exprs) and len(told) == len(set(told))


def test_a_stream_of_another_dtype_is_not_used(stored: dict[str, Expr], tmp_path: Path) -> None:
    wide = stored["wide"]
    stream = stream_of(wide)
    assert stream is not None
    value = realise(wide).float()
    write_safetensors(tmp_path / "o.safetensors", {"w": value}, {"w": wide.shape}, {"w": "float32"}, streams={"w": stream})
    assert torch.equal(realise(read_header(tmp_path / "o.safetensors").tensors["w"].load()), value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_byte_that_the_file_does_not_hold_is_found(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {f"w{i}": torch.full((1000,), float(i)) for i in range(4)}
    true = os.preadv

    def lying(descriptor: int, buffers: list[Any], offset: int) -> int:
        count = true(descriptor, buffers, offset)
        if offset > 8000:
            buffers[0][3] ^= 1
        return count

    monkeypatch.setattr(writer.os, "preadv", lying)
    before = threading.active_count()
    with pytest.raises(SurgeryError) as caught:
        write_safetensors(
            tmp_path / "o.safetensors",
            values,
            dict.fromkeys(values, (1000,)),
            dict.fromkeys(values, "float32"),
            workers=workers,
            checking=True,
        )
    assert caught.value.diagnostics[0].code == "S0804" and "does not hold what was written at byte" in caught.value.diagnostics[0].message
    assert threading.active_count() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_storage_ends_a_stream(stored: dict[str, Expr], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pieces than there are buffers: whoever waits for one is told."""
    monkeypatch.setattr("surgery.model.shards.BLOCK", 4096)
    target = tmp_path / "o.safetensors"
    target.symlink_to("/dev/full")
    stream = stream_of(stored["experts"])
    assert stream is not None
    before = threading.active_count()
    with pytest.raises(SurgeryError) as caught:
        write_safetensors(
            target, {}, {"w": stream.shape}, {"w": stream.dtype}, streams={"w": stream}, workers=workers, checking=True, hashing=True
        )
    assert caught.value.diagnostics[0].code == "S0801" and threading.active_count() == before


def test_sums_of_streams_are_the_sums_of_tensors(stored: dict[str, Expr], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.passes.kinds.slice_scores.CHUNK", 1000)
    used = 0
    for name, expr in expressions(stored).items():
        if expr.dtype == "int8" or not expr.shape:
            continue
        stream = stream_of(expr)
        assert stream is not None
        value = realise(expr)
        for axis in range(len(expr.shape)):
            plan = _Plan.of(expr.shape, axis)
            other = tuple(i for i in range(value.ndim) if i != axis)
            want = marginal(value, axis, squared=False)
            exact = value.double().abs().sum(other) if other else value.double().abs()
            assert np.allclose(want, exact.numpy(), rtol=1e-12, atol=0), name
            if plan.even and stream.unit:
                raw = joined(stream, plan.most * value.element_size())
                flat = torch.frombuffer(bytearray(raw), dtype=value.dtype)
                blocks = (flat[i : i + plan.most] for i in range(0, flat.numel(), plan.most))
                assert np.array_equal(_summed(plan, blocks, value.dtype, squared=False), want), (name, axis)
                used += 1
    assert used >= 12


# ---------------------------------------------------------------- the certificate of a large model


SPEC = 'surg 1\nprune ffn(ratio = 50%) on layers[*].ffn\nadapt lora(rank = 2) on layers[*].attn.q\nemit torch{} to "out"\n'


def test_the_certificate_of_a_large_model_says_what_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    done = api.compile(SPEC.format("") + 'emit torch(dtype = bf16) to "half"\n', checkpoint("llama"))
    for folder, found in zip(("out", "half"), [c for c in done.certificates if c["claim"] == "loaded = program"], strict=True):
        assert found["ok"] and found["max_abs_error"] == 0 and found["how"] == "read back and compared, not run"
        held = list(Path(folder).glob("*.safetensors"))
        assert found["bytes"] == sum(p.stat().st_size for p in held)
        assert found["tensors"] == sum(len(read_header(p).tensors) for p in held)
        assert found["nodes"] > 50


def test_a_large_checkpoint_says_that_its_bytes_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = 'surg 1\nprune ffn(ratio = 50%) on layers[*].ffn\nemit transformers to "{}"\n'
    api.compile(spec.format("small"), checkpoint("llama"))
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    found = api.compile(spec.format("large"), checkpoint("llama")).certificates[-1]
    assert found["claim"] == "stored = program" and found["bytes"] == Path("large/model.safetensors").stat().st_size
    assert Path("large/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()


def test_an_artifact_with_another_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of a node is stored wrong: nothing is left at the target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    true = artifact.graphjson.dump

    def wrong(root: Any) -> dict[str, Any]:
        data = true(root)
        node = next(n for m in data["modules"] for n in m.get("nodes", ()) if any(isinstance(a, float) for a in n[3]))
        node[3] = [a * 2 if isinstance(a, float) else a for a in node[3]]
        return data

    monkeypatch.setattr("surgery.model.record.graphjson.dump", wrong)
    with pytest.raises(SurgeryError) as caught:
        api.compile(SPEC.format(""), checkpoint("llama"))
    assert caught.value.diagnostics[0].code == "S0836" and "has other arguments" in caught.value.diagnostics[0].message
    assert not Path("out").exists()


def test_differences_of_graphs_are_found() -> None:
    program, _ = zoo_program("llama")
    same = program.copy()
    assert samegraph.difference(program.graph, same.graph) == ""
    layer = next(m for n, m in same.graph.named_modules() if n and isinstance(m, torch.fx.GraphModule))
    node = next(n for n in layer.graph.nodes if n.op == "call_function" and len(n.args) == 2 and isinstance(n.args[1], torch.fx.Node))
    kept = node.args
    node.args = (kept[1], kept[0])
    assert f"node {node.name} has other arguments" in samegraph.difference(program.graph, same.graph)
    node.args = kept
    linear = next(m for m in same.graph.modules() if isinstance(m, torch.nn.Linear))
    linear.in_features += 1
    assert "built from other values" in samegraph.difference(program.graph, same.graph)
    linear.in_features -= 1
    linear.weight = torch.nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.float64, device="meta"))
    assert "another parameter: weight" in samegraph.difference(program.graph, same.graph)


def test_lanes_of_a_large_program_stream_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from surgery.opening import open_program

    program, _ = open_program(str(checkpoint("llama")))
    tensors = Tensors(no_functions)
    assert streaming.lanes(program, tensors).streams == {}
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    assert set(streaming.lanes(program, tensors).streams) == {n for n, e in program.weights.items() if type(e).__name__ == "Load"} != set()
