"""Streaming safetensors files: readable by the library, the same bytes each time, little memory."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery.core.diagnostics import SurgeryError
from surgery.model import lanes
from surgery.model.checkpoint_headers import read_header
from surgery.model.checkpoint_shards import find_weights, read_tensors
from surgery.model.realise import Realiser
from surgery.model.shards import plan_shards, write_safetensors
from surgery.model.weights import Add, Expr, Init, Scale

VALUES = {
    "z.weight": torch.randn(4, 6), "a.weight": torch.randn(3).bfloat16(), "ids": torch.arange(5), "flag": torch.tensor([True, False]),
    "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "f8": torch.ones(4).to(torch.float8_e4m3fn), "naïve": torch.ones(2, 2).half(),
}  # fmt: skip


def shapes_of(values: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    return {k: tuple(v.shape) for k, v in values.items()}, {k: str(v.dtype)[6:] for k, v in values.items()}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_one_file_reads_back(tmp_path: Path, workers: int) -> None:
    seen: list[tuple[str, int]] = []
    lazy = {k: (lambda v=v: v) for k, v in VALUES.items()}
    done = write_safetensors(
        tmp_path / "m.safetensors", lazy, *shapes_of(VALUES), metadata={"format": "pt", "a": "1"}, workers=workers, hashing=True,
        progress=lambda name, size: seen.append((name, size)),
    )  # fmt: skip
    assert [p.name for p in done.files] == ["m.safetensors"]
    assert done.digests == {done.files[0]: hashlib.sha256(done.files[0].read_bytes()).hexdigest()}
    assert seen == [(k, v.numel() * v.element_size()) for k, v in VALUES.items()]
    loaded = load_file(tmp_path / "m.safetensors")
    for name, value in VALUES.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name].float(), value.float())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "1"}
    header = read_header(tmp_path / "m.safetensors")
    assert [k for k in header.tensors if header.tensors[k].nbytes] == [k for k, v in VALUES.items() if v.numel()]
    assert min(t.span[0] for t in header.tensors.values()) % 8 == 0


def test_shards_and_index(tmp_path: Path) -> None:
    values = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(7)}
    done = write_safetensors(tmp_path, values, *shapes_of(values), max_shard_bytes=900)
    assert [p.name for p in done.files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)] + ["model.safetensors.index.json"]
    assert done.total == 2800
    tensors = read_tensors(find_weights(tmp_path))
    assert {k: Path(t.file).name for k, t in tensors.items()} == done.shard_of
    for path in done.files[:-1]:
        for name, value in load_file(path).items():
            assert torch.equal(value, values[name])
    small = write_safetensors(tmp_path / "..", values, *shapes_of(values))
    assert [p.name for p in small.files] == ["model.safetensors"]


def test_plan_of_shards() -> None:
    assert plan_shards({"a": 5, "b": 5, "c": 1}, 10) == [["a", "b"], ["c"]]
    assert plan_shards({"a": 50, "b": 5}, 10) == [["a"], ["b"]]
    assert plan_shards({}, 10) == [[]]


def test_bytes_are_the_same_between_runs_threads_and_workers(tmp_path: Path) -> None:
    weights: dict[str, Expr] = {}
    for i in range(6):
        base = Init((64, 64), "bfloat16", "normal", (0.0, 0.02), i)
        weights[f"w{i}"] = Add((64, 64), "bfloat16", (base, Scale((64, 64), "bfloat16", base, 0.5)))
    shapes, dtypes = {k: e.shape for k, e in weights.items()}, {k: e.dtype for k, e in weights.items()}
    found = set()
    before = torch.get_num_threads()
    try:
        for threads, workers in ((1, 0), (2, 0), (2, 1), (1, 4)):
            torch.set_num_threads(threads)
            write_safetensors(tmp_path / "m.safetensors", Realiser(weights), shapes, dtypes, workers=workers)
            found.add((tmp_path / "m.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_order_is_as_given_and_same_as_the_library_for_its_order(tmp_path: Path) -> None:
    values = {k: VALUES[k] for k in ("z.weight", "scalar")}
    save_file(values, tmp_path / "theirs.safetensors", {"format": "pt"})
    order = {k: values[k] for k in read_header(tmp_path / "theirs.safetensors").tensors}
    write_safetensors(tmp_path / "ours.safetensors", order, *shapes_of(order))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_tensor_that_is_not_as_promised_stops_the_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: promised float32\[3\], got torch.float32\[2\]"):
        write_safetensors(tmp_path / "m.safetensors", {"a": torch.ones(2)}, {"a": (3,)}, {"a": "float32"})


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_tensor_pass_through_and_end_every_thread(tmp_path: Path, workers: int) -> None:
    def broken() -> torch.Tensor:
        raise KeyError("no")

    made = {**{f"a{i}": torch.ones(2) for i in range(9)}, "b": broken, **{f"c{i}": torch.ones(2) for i in range(9)}}
    before = threading.active_count()
    with pytest.raises(KeyError):
        write_safetensors(tmp_path / "m.safetensors", made, dict.fromkeys(made, (2,)), dict.fromkeys(made, "float32"), workers=workers)
    assert threading.active_count() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("workers", [0, 2])
def test_no_space_is_a_diagnostic(tmp_path: Path, workers: int) -> None:
    target = tmp_path / "m.safetensors"
    target.symlink_to("/dev/full")
    made = {f"a{i}": torch.ones(1000) for i in range(20)}
    before = threading.active_count()
    with pytest.raises(SurgeryError) as caught:
        write_safetensors(target, made, dict.fromkeys(made, (1000,)), dict.fromkeys(made, "float32"), workers=workers)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("S0801", 2)
    assert caught.value.diagnostics[0].message == f"there is no space left to write {target}"
    assert threading.active_count() == before


def test_what_is_on_the_way_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three workers, each tensor costs a third of the budget, one costs more than all of it: that one is made alone."""
    monkeypatch.setattr(lanes, "BUDGET", 900)
    lock, now, seen, told = threading.Lock(), [0], [0], []
    costs = {f"w{i}": 300 if i != 4 else 2000 for i in range(9)}
    most: dict[str, int] = {}

    def make(name: str) -> torch.Tensor:
        with lock:
            now[0] += costs[name]
            seen[0] = max(seen[0], now[0])
        time.sleep(0.01)
        with lock:
            most[name] = now[0]
            now[0] -= costs[name]
        return torch.ones(10)

    made = {n: (lambda n=n: make(n)) for n in costs}
    write_safetensors(
        tmp_path / "m.safetensors",
        made,
        dict.fromkeys(made, (10,)),
        dict.fromkeys(made, "float32"),
        workers=3,
        costs=costs,
        soon=told.append,
    )
    assert most["w4"] == 2000 and max(v for n, v in most.items() if n != "w4") <= 900 and seen[0] == 2000
    assert told == list(made) and len(load_file(tmp_path / "m.safetensors")) == 9


STREAM = """
import sys, torch
from pathlib import Path
from surgery.model.checkpoint_shards import find_weights, read_tensors
from surgery.model.realise import Realiser, no_functions
from surgery.model.shards import write_safetensors
from surgery.backends.streaming import cost
from surgery.model.weights import Add, Init, MatMul

source, target, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
weights = {}
for name, header in read_tensors(find_weights(source)).items():
    w = header.load()
    down = MatMul(w.shape, w.dtype, Init((w.shape[0], 8), w.dtype, "normal", (0.0, 1.0), 1), Init((8, w.shape[1]), w.dtype, "normal", (0.0, 1.0), 2))
    weights[name] = Add(w.shape, w.dtype, (w, down))
torch.ones(64, 64) @ torch.ones(64, 64)
def kib(field):
    # Not getrusage: its peak is inherited from the process that started this one.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

before = kib("VmRSS")
write_safetensors(target, Realiser(weights), {k: e.shape for k, e in weights.items()}, {k: e.dtype for k, e in weights.items()},
                  max_shard_bytes=64 << 20, workers=workers, costs={k: cost(e, no_functions) for k, e in weights.items()})
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_fold_of_many_shards_needs_a_few_tensors_of_memory(tmp_path: Path, workers: str) -> None:
    """512 MiB in 32 tensors, folded with a low-rank product: the peak above the start is far below the model."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    tensor = torch.ones(2048, 2048)
    size = tensor.numel() * 4
    values = {f"w{i}": tensor for i in range(32)}
    write_safetensors(tmp_path / "in", values, *shapes_of(values), max_shard_bytes=64 << 20)
    command = [sys.executable, "-c", STREAM, str(tmp_path / "in"), str(tmp_path / "out"), workers]
    # A fixed threshold: otherwise glibc raises it as blocks are freed and keeps blocks of up to 32 MiB for each thread, which depends on timing.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=env)
    peak = int(ran.stdout)
    # Load, product and sum are alive together, with two workers twice; the writer's queue holds finished tensors; pages of the shard being read
    # (four tensors) count while they are mapped.
    assert peak < 14 * size, f"{peak / 2**20:.0f} MiB"
    assert len(find_weights(tmp_path / "out").files) == 8
    assert sum(t.nbytes for t in read_tensors(find_weights(tmp_path / "out")).values()) == 32 * size
