"""What the end-to-end tests share: tiny models by name, specs as text, the command line in this process and in its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.cli.main import main
from tests import fixtures

ROOT = Path(__file__).resolve().parent.parent

LORA = "surg 1\n\nadapt lora(rank = 4) on layers[*].attn.{q, v}\n"


@dataclass(frozen=True)
class Ran:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def codes(self) -> list[str]:
        """The codes of the errors in the text format, in order."""
        return [line[6:11] for line in self.err.splitlines() if line.startswith("error[")]


def surgery(*args: str | Path) -> Ran:
    """One command line in this process. No test here accepts a traceback or an internal fault."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in args])
    ran = Ran(code, out.getvalue(), err.getvalue())
    assert "Traceback" not in ran.err + ran.out
    assert "S0901" not in ran.err, ran.err
    return ran


def start(*args: str | Path, threads: int = 1, **more: Any) -> subprocess.Popen[str]:
    """One command line in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **more.pop("env", {})}
    command = [sys.executable, "-m", "surgery.cli.main", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **more)


def write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def model(family: str) -> str:
    """``config:`` reference of a tiny model of the zoo, written to the working directory."""
    return fixtures.model(f"config:{family}", Path())


def checkpoint(family: str) -> str:
    """A checkpoint folder of a tiny model of the zoo in the working directory."""
    return fixtures.model(family, Path())


def tree(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; for a file itself that one."""
    folder = Path(folder)
    if folder.is_file():
        return {folder.name: folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def debris(folder: str | Path) -> list[str]:
    """Hidden files that a run left behind."""
    return sorted(str(p) for p in Path(folder).rglob(".*") if ".surgery-" in p.name)
