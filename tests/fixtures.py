"""Models by name for the examples in pages: ``bert`` a checkpoint folder, ``text-bert`` one with a tokenizer, ``config:bert`` a
configuration with seeded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def model(name: str, folder: Path) -> str:
    """Puts the model into ``folder`` and gives the reference to write on a command line that runs there."""
    from tests.zoo import ZOO

    if name.startswith("text-"):
        from tests.data_support import text_model

        return text_model(name.removeprefix("text-"), folder).name
    family = name.removeprefix("config:").removeprefix("tiny-")
    entry = ZOO[family]
    if name.startswith("config:"):
        (folder / f"{family}.json").write_text(json.dumps({"architectures": [entry.architecture], **entry.plain_config}), "utf-8")
        return f"config:{family}.json"
    save(entry.make_model(), folder / family)
    return family


def save(model: Any, folder: Path) -> None:
    """``save_pretrained`` without its bar, which would stand in what a page shows."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
