"""Hashes of files kept beside the captures, for the next process that opens the same files.

One small JSON file in the folder of captures: for each file its path and state (device, inode, size, times) and the sha256 that it had. It holds a hash
of its own content; a file that does not agree, or cannot be read, counts as empty. Writing replaces it in one step, and no fault of it matters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

NAME = "hashes.json"
KEPT = 1000
"""How many files are remembered; the oldest go first."""
QUIET = 60 * 10**9
"""Nanoseconds for which a file must have been left alone before it is hashed, for the hash to be kept.

Clocks of files are coarse, and who writes through a mapping is noted only when a page is first written after it was stored, which a system may put off
for half a minute: until then a file can change and look the same.
"""

Key = tuple[str, int, int, int, int, int]
"""Path, device, inode, size, and the times of the last change of the content and of the state, in nanoseconds."""


def settled(key: Key, began: int) -> bool:
    """Whether a file in this state had been left alone when its hashing began (nanoseconds since 1970). Nobody can set the time of the last change
    of the state, so it tells also of changes whose time was put back."""
    return key[5] + QUIET <= began


def known(folder: Path) -> dict[Key, str]:
    """What is kept."""
    try:
        found = json.loads((folder / NAME).read_bytes())
        rows = found["files"]
        if found["sha256"] != _digest(rows):
            return {}
        return {(str(path), *map(int, state)): str(digest) for path, *state, digest in rows}  # type: ignore[misc]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def keep(folder: Path, fresh: Mapping[Key, str]) -> None:
    """Adds hashes; those of earlier states of the same files go."""
    if not fresh:
        return
    paths = {key[0] for key in fresh}
    kept = {key: digest for key, digest in known(folder).items() if key[0] not in paths} | dict(fresh)
    rows = [[*key, digest] for key, digest in list(kept.items())[-KEPT:]]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{NAME}")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"sha256": _digest(rows), "files": rows}, file)
            os.replace(temporary, folder / NAME)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
