"""``surgery new method``: what it writes is a method, keeps the contract, and can be called in a spec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli.main import main
from surgery.cli.scaffold import TEMPLATES, WITHOUT
from surgery.core.catalogue import METHOD_VERBS, load

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import sys, importlib, os, pytest, torch
from pathlib import Path
folder, *verbs = sys.argv[1:]
for verb in verbs:
    importlib.import_module(f"surgery.passes.{verb}").__path__.append(f"{folder}/passes/{verb}")
from surgery.passes import registry
from surgery.core import catalogue
catalogue.load = lambda: catalogue.Catalogue.of(registry.catalogue())
import surgery.core.checker as checker
checker.load = catalogue.load
import surgery
from surgery.cli.main import main
from tests.fixtures import model
from tests.test_cases import planned
from tests.test_error_pages import FENCE, Block

def compile(name, text):
    Path(f"{name}.surg").write_text(text)
    print(f"== {name}", flush=True)
    assert main(["compile", f"{name}.surg", reference, "--out", f"{name}.out"]) == 0, name
    sys.stdout.flush()

root = os.getcwd()
os.chdir(folder)
reference = model("config:bert", Path(folder))
for verb in verbs:
    assert (verb, "fresh_one") in registry.methods()
    (m,) = FENCE.finditer(Path(f"tests/cases/{verb}_fresh_one.md").read_text())
    block = Block(m[1], m[2].split(), m[3], m.start(), m.end())
    assert surgery.check(block.body) == []
    assert "fresh_one" in planned(block, Path(folder))
    compile(verb, block.body)
if "prune" in verbs:
    compile("floor", "surg 1\\n\\nprune fresh_one(ratio = 50%, scope = global, floor = 50%) on layers[*].ffn\\n")

if "merge" in verbs:
    base, other = torch.randn(7, 5), torch.randn(7, 5)
    made = registry.get("merge", "fresh_one")(floor=0.5, scale=2.0).merge(base, [other], [0.25], 0, ())
    tau = other - base
    assert torch.allclose(made, base + 2 * 0.25 * tau.sign() * (tau.abs() - 0.5).clamp_min(0), atol=1e-6)
os.chdir(root)
print("== contract", flush=True)
sys.exit(pytest.main(["tests/test_contract.py", "-q", "-k", "fresh_one", "-p", "no:cacheprovider", "--import-mode=importlib"]))
"""

SAYS = {
    "adapt": "measured: unchanged at init",
    "convert": "measured: experts = dense at init",
    "floor": "64 -> 32 hidden units in layers[0..2].ffn",
    "freeze": "12 tensors frozen",
    "insert": "measured: unchanged at init",
    "merge": "55 tensors merged",
    "prune": "measured: removed = masked",
    "share": "measured: shared = each layer with these weights",
    "skip": "measured: removed = bypassed",
    "train": "fresh_one",
    "unfreeze": "12 tensors trainable",
    "contract": "[100%]",
}
"""What compile says of the spec of each case; ``floor`` is the pruning whose floor binds: scores alone would keep 30 to 35 units."""


def test_scaffolds_plan_compile_and_keep_the_contract(tmp_path: Path) -> None:
    """All in one process: what is written needs no edit, and what each method promises is measured."""
    (tmp_path / "passes").mkdir()
    for verb in TEMPLATES:
        assert main(["new", "method", f"{verb}/fresh_one", "--folder", str(tmp_path), "--quiet"]) == 0
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if p.is_file()}
    wanted = {f"passes/{verb}/fresh_one.py" for verb in TEMPLATES} | {f"tests/cases/{verb}_fresh_one.md" for verb in TEMPLATES}
    assert written == wanted, "one source file and one case file each"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *TEMPLATES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    told = {part.partition("\n")[0].strip(): part for part in done.stdout.split("== ") if part}
    for name in ("floor", "contract", *TEMPLATES):
        assert SAYS[name] in told[name], told[name]


def test_every_verb_with_a_kind_has_a_template_or_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "passes").mkdir()
    alive = {verb for verb, _ in load().methods}
    assert alive == {*TEMPLATES, *WITHOUT}
    for verb in METHOD_VERBS:
        if verb in TEMPLATES:
            continue
        assert main(["new", "method", f"{verb}/fresh_one", "--folder", str(tmp_path)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"S0911]: there is no template for a method of `{verb}`" in said and all(v in said.partition("help:")[2] for v in TEMPLATES)
        assert ("`fold all` then does it" in said) if verb == "fold" else (f"this version has no kind for `{verb}`" in said)
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("verb", list(TEMPLATES))
def test_scaffold_is_clean(verb: str, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    assert main(["new", "method", f"{verb}/fresh_one", "--folder", str(tmp_path), "--quiet"]) == 0
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for args in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [str(ruff), *args, "--config", str(ROOT / "pyproject.toml"), str(tmp_path / "passes")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "passes").mkdir()
    args = ["new", "method", "adapt/fresh_one", "--folder", str(tmp_path)]
    assert main(args) == 0 and main(args) == 2
    assert "S0913" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
