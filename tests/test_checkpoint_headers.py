"""Damaged, lying and foreign weight files: each has its own diagnostic, before any work is done."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.core.diagnostics import SurgeryError
from surgery.model.checkpoint import open_checkpoint
from surgery.model.checkpoint_headers import read_header

BERT = {"model_type": "bert", "architectures": ["BertModel"]}


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


FAULTS = {
    "empty": (b"", "S0707", "x.safetensors has 0 bytes, too few for a safetensors file"),
    "length beyond the file": (packed({}, length=500), "S0707", "x.safetensors claims a header of 500 bytes but has 2 behind the length"),
    "huge header": (packed({}, length=1 << 60), "S0708", f"x.safetensors claims a header of {1 << 60} bytes"),
    "not JSON": (packed(b"{nope}"), "S0708", "the header of x.safetensors is not JSON"),
    "not UTF-8": (packed(b"\xff\xfe{}"), "S0708", "the header of x.safetensors is not JSON"),
    "deep": (packed(b"[" * 200_000), "S0708", "the header of x.safetensors is not JSON"),
    "no object": (packed([1]), "S0708", "the header of x.safetensors is not a JSON object"),
    "twice": (
        packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        "S0708",
        "the header of x.safetensors names `a` twice",
    ),
    "no dtype": (packed({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "S0708", "`a` in x.safetensors lacks a dtype"),
    "negative shape": (packed({"a": entry(0, 4, [-1])}, b"1234"), "S0708", "the shape of `a` in x.safetensors is not a list of counts"),
    "float offset": (
        packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, b"1234"),
        "S0708",
        "the data_offsets of `a` in x.safetensors are not two counts",
    ),
    "metadata": (packed({"__metadata__": {"a": 1}}), "S0708", "the metadata of x.safetensors is not a table of strings"),
    "truncated data": (packed({"a": entry(0, 8)}, b"1234"), "S0707", "`a` in x.safetensors ends at byte"),
    "size of shape": (packed({"a": entry(0, 4, [7])}, b"1234"), "S0709", "`a` in x.safetensors takes 4 bytes but F32 [7] needs 28"),
    "backwards": (packed({"a": entry(4, 0, [1])}, b"1234"), "S0709", "`a` in x.safetensors takes -4 bytes"),
    "overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12), "S0709", "`b` and `a` in x.safetensors overlap"),
    "hole": (
        packed({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12),
        "S0709",
        "x.safetensors has 4 bytes before `b` that belong to no tensor",
    ),
    "tail": (packed({"a": entry(0, 4)}, b"0" * 9), "S0709", "x.safetensors has 5 bytes behind its last tensor"),
    "dtype": (
        packed({"a": entry(0, 4, [1], "F4")}, b"1234"),
        "S0710",
        "`a` in x.safetensors has the dtype 'F4', which surgery cannot read",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_have_their_own_diagnostic(tmp_path: Path, name: str) -> None:
    raw, code, message = FAULTS[name]
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(SurgeryError) as caught:
        read_header(tmp_path / "x.safetensors")
    found = caught.value.diagnostics[0]
    assert found.code == code
    assert found.message.startswith(message)
    assert found.help


@given(st.binary(max_size=200), st.integers(0, 300), st.booleans())
def test_garbage_gives_a_diagnostic_or_a_header(tmp_path_factory: pytest.TempPathFactory, raw: bytes, length: int, framed: bool) -> None:
    path = tmp_path_factory.mktemp("g") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + raw if framed else raw)
    try:
        assert read_header(path).tensors == {}
    except SurgeryError as exc:
        assert all(d.code.startswith("S07") for d in exc.diagnostics)


def test_every_truncation_of_a_real_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    assert set(read_header(path).tensors) == {"a", "b"}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SurgeryError) as caught:
            read_header(path)
        assert caught.value.diagnostics[0].code == "S0707"


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(3, 4), "h": torch.randn(2).half(), "b": torch.zeros(5, dtype=torch.bfloat16), "i": torch.arange(7),
        "u": torch.ones(3, dtype=torch.uint8), "t": torch.tensor(True), "e": torch.empty(0, 4), "f8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in header.tensors.items()} == {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in tensors.items()}
    assert header.metadata == {"format": "pt"}


# ---------------------------------------------------------------- folders


def folder(path: Path, shards: dict[str, dict], index: dict | None = None, config: object = BERT) -> Path:
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def refused(path: Path | str, **more: object) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(str(path), **more)  # type: ignore[arg-type]
    return caught.value


ONE = {"a": torch.ones(2)}
TWO = {"b": torch.ones(2)}


def test_missing_shard(tmp_path: Path) -> None:
    index = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    exc = refused(folder(tmp_path / "m", {"model-1.safetensors": ONE}, index))
    assert exc.diagnostics[0].code == "S0706"
    assert exc.diagnostics[0].message == "1 of 2 shards is missing: `model-2.safetensors`"
    assert "1 of 2 tensors are in what is missing" in exc.diagnostics[0].notes


def test_index_without_tensor_and_tensor_without_index_are_reported_together(tmp_path: Path) -> None:
    index = {"a": "model-1.safetensors", "gone": "model-1.safetensors"}
    exc = refused(folder(tmp_path / "m", {"model-1.safetensors": {**ONE, **TWO}}, index))
    assert [(d.code, d.message) for d in exc.diagnostics] == [
        ("S0711", "1 of 2 tensors of model.safetensors.index.json is not in its shard: `gone`"),
        ("S0712", "1 tensor is in the shards but not in model.safetensors.index.json: `b`"),
    ]


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"model-1.safetensors": ONE, "model-2.safetensors": {**ONE, **TWO}}
    exc = refused(folder(tmp_path / "m", shards, {"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    assert exc.diagnostics[0].code == "S0713"
    assert exc.diagnostics[0].message == "1 tensor is in two shards: `a` in model-1.safetensors and model-2.safetensors"


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_bad_index(tmp_path: Path, index: str) -> None:
    path = folder(tmp_path / "m", {"model-1.safetensors": ONE})
    (path / "model.safetensors.index.json").write_text(index)
    assert refused(path).diagnostics[0].code == "S0711"


def test_all_damaged_shards_are_reported_in_one_run(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "m", {"model-1.safetensors": ONE, "model-2.safetensors": TWO}, {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    )
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    assert [d.code for d in refused(path).diagnostics] == ["S0707", "S0707"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_pickles_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "m", {})
    (path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for ref in (path, path / name):
        found = refused(ref).diagnostics[0]
        assert found.code == "S0705"
        assert found.message == f"{name} is a pickled checkpoint, and reading one can run any code"
        assert "weights_only=True" in found.help[0]


def test_folder_without_weights_or_config(tmp_path: Path) -> None:
    assert refused(folder(tmp_path / "m", {})).diagnostics[0].code == "S0706"
    assert refused(folder(tmp_path / "n", {"model.safetensors": ONE}, config=None)).diagnostics[0].code == "S0702"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    found = refused(tmp_path / "a").diagnostics[0]
    assert (found.code, "is an adapter" in found.message) == ("S0702", True)


CONFIGS = {
    "not JSON": ("{", "S0702"), "a list": ("[]", "S0702"), "no type": ({"hidden_size": 3}, "S0703"), "unknown": ({"model_type": "lama"}, "S0703"),
    "remote code": ({"model_type": "my_own", "auto_map": {"AutoModel": "modeling.X"}}, "S0704"),
    "remote class": ({"model_type": "bert", "architectures": ["MyBert"], "auto_map": {"AutoModel": "modeling.MyBert"}}, "S0704"),
    "unknown class": ({"model_type": "bert", "architectures": ["BertModle"]}, "S0723"),
    "quantised": ({"model_type": "bert", "quantization_config": {"quant_method": "gptq"}}, "S0725"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_configs(tmp_path: Path, name: str) -> None:
    config, code = CONFIGS[name]
    found = refused(folder(tmp_path / "m", {"model.safetensors": ONE}, config=config)).diagnostics[0]
    assert found.code == code
    assert found.help


def test_near_names_of_families_and_classes(tmp_path: Path) -> None:
    found = refused(folder(tmp_path / "m", {"model.safetensors": ONE}, config={"model_type": "lama"})).diagnostics[0]
    assert "`llama`" in found.help[0]
    found = refused(folder(tmp_path / "n", {"model.safetensors": ONE}, config=CONFIGS["unknown class"][0])).diagnostics[0]
    assert "`BertModel`" in found.help[0]
