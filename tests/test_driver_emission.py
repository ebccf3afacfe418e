"""Outputs from end to end: the same bytes from the same inputs, whole or not at all, and nothing of others replaced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model.atomic import AtomicOutput
from tests.caching import capture_cache
from tests.driver_support import LORA, checkpoint, debris, model, start, surgery, tree, write

TORCH = LORA + 'emit torch to "out"\n'
ALL = LORA + 'emit torch to "out"\nemit onnx to "out.onnx"\nemit report to "out.html"\n'


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All three outputs made twice in processes of their own, with one thread and with two."""
    home = tmp_path_factory.mktemp("emitted")
    write(home / "a.surg", ALL)
    old = Path.cwd()
    os.chdir(home)
    try:
        model("bert")
    finally:
        os.chdir(old)
    env = {"SURGERY_CACHE": str(capture_cache(tmp_path_factory))}
    for threads in (1, 2):
        run = start("compile", "a.surg", "config:bert.json", "--out", f"t{threads}", threads=threads, cwd=home, env=env)
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert out.splitlines()[-2:] == [f"t{threads}/out.onnx", f"t{threads}/out.html"]
    return home / "t1", home / "t2"


def test_bytes_do_not_depend_on_the_run_or_the_threads(emitted: tuple[Path, Path]) -> None:
    one, two = (tree(folder) for folder in emitted)
    assert sorted(one) == sorted(two)
    assert {"out/surgery.json", "out/graph.json", "out/model.safetensors", "out.onnx", "out.html"} <= set(one)
    assert [name for name in one if one[name] != two[name]] == []


CHOSEN = """surg 1

data ids = tensors("ids.safetensors")

prune heads(ratio = 50%, score = taylor) on layers[*].attn using ids
prune mask(ratio = 50%, score = sparsegpt) on layers[*].ffn.{up, down} using ids
adapt lora(rank = 4) on layers[*].attn.{q, v}
fold all on layers[*].attn.{q, v}
emit torch to "out"
"""


def test_choices_by_data_do_not_depend_on_the_threads(here: Path) -> None:
    """Gradients, second moments, masks and their certificates: everything that is computed from samples."""
    import torch
    from safetensors.torch import save_file

    ids = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "ids.safetensors")
    write("a.surg", CHOSEN)
    folder = checkpoint("bert")
    for threads in (1, 2):
        run = start("compile", "a.surg", f"./{folder}", "--out", f"t{threads}", threads=threads, cwd=here)
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    one, two = tree("t1"), tree("t2")
    assert one and sorted(one) == sorted(two) and [name for name in one if one[name] != two[name]] == []


def test_the_report_needs_nothing_else(emitted: tuple[Path, Path]) -> None:
    page = (emitted[0] / "out.html").read_text("utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and "<script src" not in page
    assert "adapt lora(rank = 4) on layers[*].attn.{q, v}" in page and "torch = onnx" in page and "1,536" in page


def test_the_onnx_file_computes_what_the_live_model_computes(emitted: tuple[Path, Path]) -> None:
    import onnxruntime
    import torch

    import surgery as api

    run = onnxruntime.InferenceSession(str(emitted[0] / "out.onnx"), providers=["CPUExecutionProvider"])
    module = api.load(emitted[0] / "out").eval()
    for batch, length in ((1, 5), (3, 31)):
        ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            want = module(**given).last_hidden_state
        got = run.run(["last_hidden_state"], {k: v.numpy() for k, v in given.items()})[0]
        assert torch.allclose(want, torch.from_numpy(got), atol=1e-5)


def test_own_output_is_replaced_and_that_of_others_is_not(here: Path) -> None:
    reference = model("bert")
    write("a.surg", TORCH + 'emit report to "page.html"\n')
    assert surgery("compile", "a.surg", reference).code == 0
    write("a.surg", TORCH.replace("rank = 4", "rank = 2") + 'emit report to "page.html"\n')
    assert surgery("compile", "a.surg", reference).code == 0, "an edited spec is still the same spec"
    own = tree("out"), tree("page.html")
    write("b.surg", Path("a.surg").read_text("utf-8"))
    ran = surgery("compile", "b.surg", reference)
    assert (ran.code, ran.codes) == (2, ["S0803"])
    assert (tree("out"), tree("page.html")) == own and not Path("b.surg.lock").exists()
    assert surgery("compile", "b.surg", reference, "--force").code == 0
    assert surgery("compile", "b.surg", reference).code == 0
    assert surgery("compile", "a.surg", reference).codes == ["S0803"]


def test_what_is_not_ours_stays(here: Path) -> None:
    reference = model("bert")
    write("a.surg", TORCH)
    write("out", "a letter")
    assert surgery("compile", "a.surg", reference).codes == ["S0803"]
    Path("out").unlink()
    write("out/letter.txt", "a letter")
    assert surgery("compile", "a.surg", reference).codes == ["S0803"]
    assert tree("out") == {"letter.txt": b"a letter"}
    Path("out/letter.txt").unlink()
    assert surgery("compile", "a.surg", reference).code == 0, "an empty folder may be filled"


@pytest.mark.parametrize("emitted", ["", 'emit onnx to "out"\n', 'emit report to "out"\n'], ids=["torch", "onnx", "report"])
def test_devices_and_pipes_are_never_replaced(here: Path, emitted: str) -> None:
    """Not by `--force` either: as root it would take the place of a device that everybody writes to."""
    reference = model("bert")
    write("a.surg", TORCH if not emitted else "surg 1\n" + emitted)
    os.mkfifo("out")
    ran = surgery("compile", "a.surg", reference, "--force")
    assert (ran.code, ran.codes) == (2, ["S0803"]) and "a pipe" in ran.err
    assert stat.S_ISFIFO(os.lstat("out").st_mode)
    with pytest.raises(SurgeryError, match="S0803"), AtomicOutput("out", force=True):
        pass


def test_a_trained_artifact_is_not_replaced_by_its_own_spec(here: Path) -> None:
    import surgery as api

    reference = model("bert")
    write("a.surg", TORCH)
    assert surgery("compile", "a.surg", reference).code == 0
    api.save(api.load("out"), "out", force=True)
    trained = tree("out")
    assert surgery("compile", "a.surg", reference).codes == ["S0803"]
    assert tree("out") == trained


def test_one_output_that_fails_leaves_all_of_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second output cannot be made: the first, which could, stays as it was."""
    from surgery.backends import to_report

    reference = model("bert")
    text = TORCH + 'emit report to "page.html"\n'
    write("a.surg", text)
    assert surgery("compile", "a.surg", reference).code == 0
    before = tree("out"), tree("page.html"), tree("a.surg.lock")

    def fails(*args: object, **more: object) -> str:
        raise fail("S0842", "it does not compute what it should")

    monkeypatch.setattr(to_report, "render", fails)
    write("a.surg", text.replace("rank = 4", "rank = 8"))
    ran = surgery("compile", "a.surg", reference)
    assert (ran.code, ran.codes) == (1, ["S0842"])
    assert (tree("out"), tree("page.html"), tree("a.surg.lock")) == before
    assert debris(here) == []


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_storage_that_fails(here: Path, monkeypatch: pytest.MonkeyPatch, fault: int, call: str) -> None:
    reference = model("bert")
    write("a.surg", TORCH)
    assert surgery("compile", "a.surg", reference).code == 0
    before = tree(here)
    write("a.surg", TORCH.replace("rank = 4", "rank = 8"))
    before["a.surg"] = Path("a.surg").read_bytes()
    if call == "fsync":

        def fails(handle: int) -> None:
            raise OSError(fault, os.strerror(fault))

        monkeypatch.setattr(os, "fsync", fails)
    else:
        real = Path.write_text

        def refuses(self: Path, *args: object, **more: object) -> int:
            if self.name == "graph.json":
                raise OSError(fault, os.strerror(fault))
            return real(self, *args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "write_text", refuses)
    ran = surgery("compile", "a.surg", reference)
    wanted = {errno.ENOSPC: "S0801", errno.EDQUOT: "S0801", errno.EACCES: "S0802", errno.EROFS: "S0802", errno.EIO: "S0804"}[fault]
    assert (ran.code, ran.codes) == (2, [wanted])
    assert tree(here) == before
    assert debris(here) == []


def test_a_target_that_cannot_be(here: Path) -> None:
    reference = model("bert")
    write("file", "x")
    write("a.surg", TORCH.replace('"out"', '"file/out"'))
    before = tree(here)
    ran = surgery("compile", "a.surg", reference)
    assert (ran.code, ran.codes) == (2, ["S0802"])
    assert tree(here) == before


@pytest.mark.parametrize(
    ("first", "second"), [("p", "p/x.onnx"), ("p/q/page.html", "p"), (".", "p"), ("a/../p", "p/q"), ("/tmp/p", "/tmp/p/q")]
)
def test_an_output_inside_another_is_refused(here: Path, first: str, second: str) -> None:
    kind = {".html": "report", ".onnx": "onnx"}
    lines = "".join(f'emit {kind.get(Path(t).suffix, "torch")} to "{t}"\n' for t in (first, second))
    write("a.surg", LORA + lines)
    before = tree(here)
    ran = surgery("compile", "a.surg", model("bert"))
    assert (ran.code, ran.codes) == (1, ["S0845"])
    assert {n: b for n, b in tree(here).items() if n != "bert.json"} == before
    write("a.surg", LORA + 'emit torch to "p"\nemit report to "pp/x.html"\nemit report to "p.html"\n')
    assert surgery("check", "a.surg").code == 0


@pytest.mark.parametrize(("to", "code"), [("link/page.html", "S0845"), ("link", "S0403")])
def test_links_and_absolute_paths_do_not_hide_it(here: Path, to: str, code: str) -> None:
    """What the text alone does not show is refused before any work."""
    (here / "link").symlink_to("p")
    write("a.surg", LORA + f'emit torch to "{here}/p"\nemit {"report" if "html" in to else "torch"} to "{to}"\n')
    reference = model("bert")
    ran = surgery("compile", "a.surg", reference)
    assert (ran.code, ran.codes) == (1, [code]), ran.err
    assert sorted(p.name for p in here.iterdir()) == ["a.surg", "bert.json", "link"]


def test_a_full_disk(here: Path) -> None:
    """A real one of 100 KiB, where the system lets us make it."""
    import subprocess

    Path("small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", "small"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        write("a.surg", TORCH)
        ran = surgery("compile", "a.surg", checkpoint("bert"), "--out", "small")
        assert (ran.code, ran.codes) == (2, ["S0801"])
        assert list(Path("small").iterdir()) == [] and not Path("a.surg.lock").exists()
    finally:
        subprocess.run(["umount", "small"], check=True)


def test_two_runs_at_once(here: Path) -> None:
    """While one writes, the other is told so."""
    from surgery.model.atomic import AtomicOutput

    write("a.surg", TORCH)
    reference = model("bert")
    with pytest.raises(SurgeryError), AtomicOutput("out", force=True):
        ran = surgery("compile", "a.surg", reference)
        assert (ran.code, ran.codes) == (2, ["S0805"])
        raise SurgeryError()
    assert surgery("compile", "a.surg", reference).code == 0


def test_what_a_run_reads_is_never_replaced(here: Path) -> None:
    """``--force`` replaces outputs, not the spec, the model or the folder that holds the user's work."""
    folder = checkpoint("bert")
    write("notes.txt", "mine")
    for target, what in {
        ".": "is the working directory", "": "is the working directory", f"{folder}/..": "the working directory", folder: "is the model",
        f"{folder}/config.json": "is a file of the model", "a.surg": "is the spec", "a.surg.lock": "is the lock of the spec",
    }.items():  # fmt: skip
        write("a.surg", LORA + f'emit torch to "{target}"\n')
        before = tree(".")
        ran = surgery("compile", "a.surg", folder, "--force")
        assert (ran.code, ran.codes) == (2, ["S0846"]) and what in ran.err, (target, ran.err)
        assert tree(".") == before, target
    write("a.surg", LORA + f'emit torch to "{folder}/inside"\n')
    assert surgery("compile", "a.surg", folder).code == 0, "a new place inside is one of its own"
