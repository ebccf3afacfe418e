"""A small tokenizer, files of samples, and samples of the zoo's models, for tests of what reads data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.model.data import Samples
from surgery.model.program import Program
from tests.fixtures import save
from tests.zoo import ZOO

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 99)))
"""99 tokens: the vocabulary of the zoo's models."""


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """A word-level tokenizer that puts [CLS] in front and [SEP] behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def text_model(family: str, folder: Path) -> Path:
    """The zoo's model of a family as a checkpoint with a tokenizer."""
    target = folder / f"text-{family}"
    save(ZOO[family].make_model(), target)
    write_tokenizer(target)
    return target


def sentence(count: int, seed: int = 0) -> str:
    draw = torch.randint(4, 99, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in draw)


def write_lines(path: Path, count: int, shortest: int = 3) -> Path:
    """``count`` lines of ``shortest`` and more words."""
    path.write_text("".join(sentence(shortest + i % 7, i) + "\n" for i in range(count)), "utf-8")
    return path


def zoo_rows(program: Program, family: str, count: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    """Inputs of the zoo for a family as rows; caches, and the masks and positions that go with them, are left to be made."""
    given = ZOO[family].inputs(count, length)
    left = {"attention_mask", "position_ids"} if "past_key_values" in program.signature.parameters else set()
    kept = {k: v for k, v in given.items() if k in program.signature.parameters and isinstance(v, Tensor) and k not in left}
    return [{k: v[i] for k, v in kept.items()} for i in range(count)]


def zoo_samples(program: Program, family: str, count: int = 3, batch: int = 2, length: int = 9) -> Samples:
    return Samples(zoo_rows(program, family, count, length), batch=batch)


def spec(*lines: str) -> str:
    return "\n".join(["surg 1", "", *lines, ""])


def codes(error: Any) -> list[str]:
    return [d.code for d in error.value.diagnostics]
