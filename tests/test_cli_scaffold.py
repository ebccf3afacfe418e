"""``surgery new method``: what it writes is a method, keeps the contract, and can be called in a spec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli.main import main
from surgery.cli.scaffold import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import sys, importlib, pytest
folder, verb = sys.argv[1:]
importlib.import_module(f"surgery.passes.{verb}").__path__.append(f"{folder}/passes/{verb}")
from surgery.passes import registry
assert (verb, "fresh_one") in registry.methods()
from surgery.core import catalogue
catalogue.load = lambda: catalogue.Catalogue.of(registry.catalogue())
import surgery.core.checker as checker
checker.load = catalogue.load
import surgery
from pathlib import Path
page = Path(f"{folder}/tests/cases/{verb}_fresh_one.md").read_text()
found = surgery.check(page.split("```surg")[1].split("\\n", 1)[1].split("```")[0])
assert found == [], found
from tests.test_error_pages import FENCE, Block
from tests.test_cases import planned
for m in FENCE.finditer(page):
    shown = planned(Block(m[1], m[2].split(), m[3], m.start(), m.end()), Path(folder))
    assert "fresh_one" in shown, shown
    print(shown)
sys.exit(pytest.main(["tests/test_contract.py", "-q", "-k", "fresh_one", "-p", "no:cacheprovider", "--import-mode=importlib"]))
"""


@pytest.mark.parametrize("verb", list(TEMPLATES))
def test_scaffold_keeps_the_contract(verb: str, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    assert main(["new", "method", f"{verb}/fresh_one", "--folder", str(tmp_path), "--quiet"]) == 0
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if p.is_file())
    assert written == [f"passes/{verb}/fresh_one.py", f"tests/cases/{verb}_fresh_one.md"], "one source file and one case file"
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path), verb], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


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
