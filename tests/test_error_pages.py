"""Every code has a page, every page's code exists, and every page tells the truth.

A page has ``## Wrong`` and ``## Right``. Their code blocks are run in an empty folder:

- ```` ```surg [check|plan|compile] [model=bert|config:bert] [adapter=news,legal] [set=r=16] [lock] ```` runs the verb on the spec (as
  ``spec.surg``) beside these adapters (see ``tests/adapters.py``);
- ```` ```surg file=common.surg ```` only writes a file for the blocks that follow, as ```` ```text file=NAME [encoding=latin-1] ```` does;
- ```` ```python setup ```` only prepares the folder for them;
- ```` ```python ```` is executed; it raises a SurgeryError, or prints what it has to say;
- ```` ```sh ```` holds ``surgery ...`` command lines.

In ``Wrong`` the ```` ```text ```` block behind it is the exact text that surgery writes; ``pytest --update-golden`` rewrites it. In ``Right`` nothing
may be reported.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery.cli.main import main
from surgery.cli.views import text as view
from surgery.core.diagnostics import SurgeryError
from tests.caching import capture_cache

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs/errors").glob("S[0-9][0-9][0-9][0-9].md"))
FENCE = re.compile(r"^```(\S*)[ \t]*([^\n]*)\n(.*?)^```[ \t]*$", re.M | re.S)
LITERAL = re.compile(r"[\"'](S0[1-9]\d\d)[\"']")


@dataclass
class Block:
    language: str
    words: list[str]
    body: str
    start: int
    end: int

    def get(self, key: str) -> str:
        return next((w.removeprefix(f"{key}=") for w in self.words if w.startswith(f"{key}=")), "")


def section(page: str, title: str) -> list[Block]:
    """The code blocks of one section, with their places in the page."""
    found = re.search(rf"^## {title}\s*$", page, re.M)
    assert found, f"the page has no section `## {title}`"
    after = re.search(r"^## ", page[found.end() :], re.M)
    end = found.end() + after.start() if after else len(page)
    return [Block(m[1], m[2].split(), m[3], m.start(), m.end()) for m in FENCE.finditer(page, found.end(), end)]


def execute(block: Block, folder: Path) -> str:
    """Runs one block in ``folder`` and gives what it reported."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if block.language == "python":
            try:
                exec(compile(block.body, "<page>", "exec"), {"__name__": "__page__"})
                shown = out.getvalue()
            except SurgeryError as e:
                shown = out.getvalue() + view.render(e.diagnostics)
        elif block.language == "sh":
            for line in block.body.splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    assert words[0] == "surgery", "only surgery's own command lines are run"
                    main([*words[1:], "--quiet"])
            shown = err.getvalue()
        else:
            verb = next((w for w in block.words if w in ("check", "plan", "compile")), "check")
            (folder / "spec.surg").write_text(block.body, "utf-8")
            args = [verb, "spec.surg"]
            adapters(block, folder)
            if block.get("model"):
                from tests.fixtures import model

                args.append(model(block.get("model"), folder))
            args += [x for w in block.words if w.startswith("set=") for x in ("--set", w.removeprefix("set="))]
            args += ["--locked"] if "locked" in block.words else []
            main([*args, "--quiet"])
            shown = err.getvalue()
    return shown.replace(f"{folder}/", "").replace(str(folder), ".")


def adapters(block: Block, folder: Path) -> None:
    """Writes the adapters that a block names."""
    if block.get("adapter"):
        from tests.adapters import example

        for name in block.get("adapter").split(","):
            example(name, folder)


def is_case(block: Block) -> bool:
    return block.language in ("surg", "python", "sh") and not block.get("file") and "setup" not in block.words


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))


def run_section(page: str, title: str, folder: Path) -> list[tuple[Block, str, Block | None]]:
    """Runs the cases of a section in order: (case, what it reported, its expected text)."""
    blocks = section(page, title)
    out: list[tuple[Block, str, Block | None]] = []
    for i, block in enumerate(blocks):
        if block.get("file"):
            target = folder / block.get("file")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.body, block.get("encoding") or "utf-8")
        elif "setup" in block.words:
            assert not execute(block, folder), "a setup has nothing to report"
        elif is_case(block):
            following = blocks[i + 1] if i + 1 < len(blocks) else None
            expected = following if following is not None and following.language == "text" and not following.get("file") else None
            out.append((block, execute(block, folder), expected))
    return out


@pytest.mark.parametrize("path", PAGES, ids=[p.stem for p in PAGES])
def test_wrong(path: Path, tmp_path: Path, update_golden: bool) -> None:
    page = path.read_text("utf-8")
    assert page.startswith(f"# {path.stem}: "), "the first line is `# CODE: headline`"
    results = run_section(page, "Wrong", tmp_path)
    assert results, "nothing is run"
    assert any(f"[{path.stem}]" in shown for _, shown, _ in results), results[0][1] or "nothing was reported"
    if update_golden:
        for block, shown, expected in reversed(results):
            fenced = f"```text\n{shown.rstrip()}\n```"
            page = (
                page[: expected.start] + fenced + page[expected.end :]
                if expected
                else page[: block.end] + f"\n\n{fenced}" + page[block.end :]
            )
        path.write_text(page, "utf-8")
        return
    for _, shown, expected in results:
        assert expected is not None, "a wrong example needs the text that surgery writes: pytest --update-golden adds it"
        assert shown.rstrip() == expected.body.rstrip()


@pytest.mark.parametrize("path", PAGES, ids=[p.stem for p in PAGES])
def test_right(path: Path, tmp_path: Path) -> None:
    results = run_section(path.read_text("utf-8"), "Right", tmp_path)
    for _, shown, _ in results:
        assert "error[" not in shown and f"[{path.stem}]" not in shown, shown


def codes_in_sources() -> dict[str, Path]:
    """Every code that stands as a literal in the sources, with one file that has it."""
    found: dict[str, Path] = {}
    for folder in ("surgery", "grammar", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if folder == "surgery" and parts[1] in ("grammar", "passes", "backends"):
                continue
            for code in LITERAL.findall(path.read_text("utf-8")):
                found.setdefault(code, path.relative_to(ROOT))
    return found


def test_every_code_has_a_page() -> None:
    pages = {p.stem for p in PAGES}
    assert {c: str(p) for c, p in codes_in_sources().items() if c not in pages} == {}


def test_every_page_has_a_code() -> None:
    assert {p.stem for p in PAGES} - set(codes_in_sources()) == set()


def test_pages_are_packaged() -> None:
    from surgery.cli.explaining import pages

    assert pages() == {p.stem: p.read_text("utf-8") for p in PAGES}, "run `python -m surgery.dev generate`"
