"""Models by name for the examples in pages: ``bert`` a checkpoint folder, ``config:bert`` a configuration with seeded weights."""

from __future__ import annotations

import json
from pathlib import Path


def model(name: str, folder: Path) -> str:
    """Puts the model into ``folder`` and gives the reference to write on a command line that runs there."""
    from tests.zoo import ZOO

    family = name.removeprefix("config:").removeprefix("tiny-")
    entry = ZOO[family]
    if name.startswith("config:"):
        (folder / f"{family}.json").write_text(json.dumps({"architectures": [entry.architecture], **entry.plain_config}), "utf-8")
        return f"config:{family}.json"
    entry.make_model().save_pretrained(folder / family)  # type: ignore[operator]
    return family
