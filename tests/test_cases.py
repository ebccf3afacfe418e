"""The cases: one Markdown file each, a spec on a tiny model and the plan that surgery shows for it.

```` ```surg plan model=config:bert ```` (or ``compile``) is run in a folder of its own (with the files of
```` ```text file=NAME ```` blocks) and must end with exit code 0; the ```` ```text ```` block behind it is the exact plan. ``pytest --update-golden`` writes it.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from surgery.cli.main import main
from tests.test_error_pages import FENCE, Block, adapters, plain  # noqa: F401  the fixture

CASES = sorted((Path(__file__).parent / "cases").glob("*.md"))


def planned(block: Block, folder: Path) -> str:
    """What the verb of a block writes to the standard output."""
    from tests.fixtures import model

    (folder / "case.surg").write_text(block.body, "utf-8")
    adapters(block, folder)
    verb = block.words[0] if block.words else "plan"
    args = [verb, "case.surg", model(block.get("model") or "config:bert", folder), "--quiet"]
    args += [x for w in block.words if w.startswith("set=") for x in ("--set", w.removeprefix("set="))]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(args)
    assert code == 0, err.getvalue() + out.getvalue()
    return out.getvalue().replace(f"{folder}/", "")


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_case(path: Path, tmp_path: Path, update_golden: bool) -> None:
    page = path.read_text("utf-8")
    blocks = [Block(m[1], m[2].split(), m[3], m.start(), m.end()) for m in FENCE.finditer(page)]
    specs = [i for i, b in enumerate(blocks) if b.language == "surg"]
    assert specs, "a case has a ```surg block"
    for block in blocks:
        if block.get("file"):
            (tmp_path / block.get("file")).write_text(block.body, "utf-8")
    for i in reversed(specs):
        shown = planned(blocks[i], tmp_path).rstrip()
        expected = blocks[i + 1] if i + 1 < len(blocks) and blocks[i + 1].language == "text" else None
        if update_golden:
            fenced = f"```text\n{shown}\n```"
            page = (
                page[: expected.start] + fenced + page[expected.end :]
                if expected
                else page[: blocks[i].end] + f"\n\n{fenced}" + page[blocks[i].end :]
            )
        elif expected is not None:
            assert shown == expected.body.rstrip()
    if update_golden:
        path.write_text(page, "utf-8")


def test_every_method_has_a_case() -> None:
    from surgery.core.catalogue import load

    text = "\n".join(p.read_text("utf-8") for p in CASES)
    missing = [f"{verb} {name}" for verb, name in load().methods if not re.search(rf"^\s*{verb}\s+{name}\b", text, re.M)]
    assert missing == []
