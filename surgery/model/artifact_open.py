"""Opening an artifact: manifest, files and tensor headers are checked here, before anything is made of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model.graphnames import malformed

FORMAT = 1
MANIFEST = "surgery.json"
GRAPH = "graph.json"
CONSTANTS = "constants.safetensors"
SPEC = "spec.surg"
LOCK = "spec.surg.lock"
MAX_JSON = 512 << 20
MAX_FILES = 10_000
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_RECORD = (
    "info",
    "dtype",
    "signature",
    "aliases",
    "frozen",
    "attachments",
    "schedules",
    "named",
    "gone",
    "past",
    "journal",
    "sources",
    "generation",
)


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest, files and tensor headers have been checked. ``tensors`` maps a name to its header."""

    folder: Path
    manifest: dict[str, Any]
    graph: Any
    tensors: dict[str, Any] = field(repr=False)

    @property
    def record(self) -> dict[str, Any]:
        return {**{k: self.manifest.get(k) for k in _RECORD}, "graph": self.graph}


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in a manifest but the digest itself."""
    plain = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def open_artifact(folder: str | Path, *, verify: str = "fast") -> Artifact:
    """The checked artifact of a folder; no tensor is read.

    ``verify="all"`` also compares the hashes of the weights. Raises S0820 (no artifact, a file is missing), S0821 (a newer
    format), S0822 (a file or the manifest was changed), S0823 (a path that leaves the folder), S0828 (too large), S0826 (damaged
    data), S0707 to S0710 (tensor headers).
    """
    from surgery.model.checkpoint_headers import read_header

    folder = Path(folder)
    with tidy(folder):
        manifest = _read_manifest(folder)
        tensors: dict[str, Any] = {}
        for name, entry in manifest["files"].items():
            path = _inside(folder, name)
            weights = name.endswith(".safetensors")
            if path.stat().st_size != entry["bytes"] or ((not weights or verify == "all") and file_digest(path) != entry["sha256"]):
                raise fail(
                    "S0822",
                    f"{name} in {folder} is not the file that surgery wrote",
                    help="emit the artifact again; to keep a trained model use surgery.save",
                )
            if weights:
                tensors |= read_header(path).tensors
        graph = _read_json(folder / GRAPH, folder) if GRAPH in manifest["files"] else None
    if graph is None:
        raise fail("S0820", f"{folder} has no {GRAPH}", help="copy the whole folder, or emit it again")
    return Artifact(folder, manifest, graph, tensors)


def compare_hashes(folder: Path, hashes: Mapping[Path, str]) -> None:
    """Files of an artifact that were hashed for another purpose are what the manifest says. Raises S0822, and what :func:`open_artifact` does."""
    said = _read_manifest(folder)["files"]
    for path, digest in hashes.items():
        entry = said.get(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else None
        if entry is not None and entry["sha256"] != digest:
            raise fail(
                "S0822", f"{path.relative_to(folder)} in {folder} is not the file that surgery wrote",
                help="emit the artifact again; to keep a trained model use surgery.save",
            )  # fmt: skip


@contextmanager
def tidy(folder: Path) -> Iterator[None]:
    try:
        yield
    except SurgeryError:
        raise
    except OSError as err:
        raise fail(
            "S0820", f"{folder} cannot be read: {err.strerror or err}", exit_code=2, help="check the path and its permissions"
        ) from err
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
        raise malformed(f"{type(err).__name__}: {str(err)[:120]}") from err


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
        raise fail(
            "S0820",
            f"{folder} is not an artifact of surgery: it has no {MANIFEST}",
            exit_code=2,
            help="give the folder that `emit torch` wrote",
        )
    manifest = _read_json(folder / MANIFEST, folder)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise fail("S0820", f"{folder / MANIFEST} is not a manifest of surgery", help="give the folder that `emit torch` wrote")
    if manifest["format"] > FORMAT:
        raise fail(
            "S0821", f"the artifact {folder} has format {manifest['format']}, this surgery reads up to {FORMAT}",
            help=f"install surgery {str(manifest.get('surgery', ''))[:20]} or newer",
        )  # fmt: skip
    if manifest.get("digest") != manifest_digest(manifest):
        raise fail(
            "S0822",
            f"the manifest of {folder} was changed after surgery wrote it",
            help="emit the artifact again; a manifest is not meant to be edited",
        )
    if not isinstance(manifest["files"], dict) or len(manifest["files"]) > MAX_FILES:
        raise malformed("the manifest lists no files")
    return manifest


def _inside(folder: Path, name: Any) -> Path:
    """The path of a listed file: a plain relative name of a regular file that no link leads to."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= 4 or any(not _PART.fullmatch(p) for p in parts) or PurePosixPath(name).is_absolute():
        raise fail(
            "S0823",
            f"the manifest of {folder} names {str(name)[:80]!r}, which is not a file in the folder",
            help="do not use this artifact: it was made to reach other files",
        )
    path = folder
    for i, part in enumerate(parts):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            raise fail("S0820", f"{name} is missing from {folder}", help="copy the whole folder, or emit it again") from None
        if not (stat.S_ISREG(mode) if i == len(parts) - 1 else stat.S_ISDIR(mode)):
            raise fail(
                "S0823", f"{name} in {folder} is a link or no regular file", help="copy the artifact with its files, not with links to them"
            )
    return path


def _read_json(path: Path, folder: Path) -> Any:
    _inside(folder, path.name)
    size = path.stat().st_size
    if size > MAX_JSON:
        raise fail("S0828", f"{path} has {size} bytes, more than any artifact needs ({MAX_JSON})", help="do not use this artifact")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise malformed(f"{path.name} is not JSON: {str(err)[:80]}") from err
