"""Samples of text: lines of a file, or a field of its JSON lines, through the model's own tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.data import Samples
from surgery.model.program import Program
from surgery.model.sample import vocabulary

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm")
"""Files that hold a vocabulary."""


@dataclass(frozen=True)
class Ask:
    """What a ``data`` statement asks for, with the places in the spec. ``samples`` is None for all, ``length`` None when it was not
    written. ``shown`` is the path as written."""

    path: Path
    shown: str
    samples: int | None
    length: int | None
    seed: int
    batch: int
    field: str | None
    span: Span
    samples_span: Span
    length_span: Span
    field_span: Span


def text_samples(ask: Ask, program: Program, checkpoint: Any) -> Samples:
    """Raises S0740-S0744, S0748, S0749, S0751 and S0756."""
    if "input_ids" not in program.signature.parameters:
        raise fail(
            "S0751", f"the model reads no text: its inputs are {', '.join(program.signature.parameters)}", ask.span, "text for this model",
            help='give its inputs as tensors: `tensors("inputs.safetensors")` with a tensor for each input',
        )  # fmt: skip
    length = _length(ask, program)
    total = sum(1 for _ in texts(ask))
    if not total:
        raise fail("S0741", f"{ask.shown} holds no sample", ask.span, "empty", help="write one sample a line; empty lines do not count")
    if ask.samples is not None and ask.samples > total:
        raise too_few(ask, total)
    tokenizer = load_tokenizer(checkpoint, ask.span)
    order = choice(total, total, ask.seed)
    rows: list[dict[str, torch.Tensor]] = []
    want = total if ask.samples is None else ask.samples
    for text in _picked(ask, order, want):
        ids = tokenizer.encode(text, length)
        if ids:
            rows.append({"input_ids": torch.tensor(ids, dtype=torch.int64)})
    if not rows:
        raise fail(
            "S0741", f"{ask.shown} holds no sample: no line gives a token", ask.span, "empty", help="write text that the tokenizer knows"
        )
    if ask.samples is not None and len(rows) < ask.samples:
        raise too_few(ask, len(rows))
    check_ids(max(int(r["input_ids"].max()) for r in rows), program, ask.span, "the tokenizer", "is it the tokenizer of another model?")
    return Samples(rows, ask.batch, tokenizer.pad, ask.shown)


def too_few(ask: Ask, found: int) -> Exception:
    return fail(
        "S0742", f"{ask.samples} samples are asked for and {ask.shown} has {found}", ask.samples_span, "more than there are",
        help=f"write `samples = {found}` or fewer, leave it out to read all, or add samples to the file",
    )  # fmt: skip


def check_ids(highest: int, program: Program, span: Span, who: str, advice: str) -> None:
    rows = vocabulary(program, "input_ids")
    if rows is not None and highest >= rows:
        raise fail(
            "S0749", f"{who} gives the token id {highest} and the model has {rows} tokens", span, "ids out of range", help=advice
        )  # fmt: skip


def choice(total: int, count: int, seed: int) -> list[int]:
    """``count`` of ``total`` places in a seeded order."""
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:count]


# ---------------------------------------------------------------- files


def lines(ask: Ask) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers. Raises S0740 and S0743."""
    try:
        with open(ask.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as exc:
                    raise fail(
                        "S0743", f"{ask.shown} is not UTF-8 text: line {number}, byte {exc.start + 1}", ask.span, "not UTF-8",
                        help="write the file again as UTF-8",
                    ) from None  # fmt: skip
                if text.strip():
                    yield number, text.strip("\r\n")
    except OSError as exc:
        raise unreadable(ask, exc) from None


def unreadable(ask: Ask, exc: OSError) -> Exception:
    if isinstance(exc, FileNotFoundError):
        return fail(
            "S0740", f"there is no file {ask.shown}", ask.span, "not found", help="a path is relative to the spec's own folder"
        )  # fmt: skip
    why = "it is a folder" if isinstance(exc, IsADirectoryError) else (exc.strerror or type(exc).__name__).lower()
    return fail("S0740", f"cannot read {ask.shown}: {why}", ask.span, "not readable", help="name a file that can be read")


def texts(ask: Ask) -> Iterator[str]:
    for number, line in lines(ask):
        if ask.field is None:
            yield line
            continue
        text = _field(ask, number, line)
        if text.strip():
            yield text


def _field(ask: Ask, number: int, line: str) -> str:
    def bad(why: str, span: Span, help: str) -> Exception:
        return fail("S0744", f"line {number} of {ask.shown} {why}", span, "bad line", help=help)

    shape = f'each line is one JSON object such as `{{"{ask.field}": "..."}}`'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise bad(f"is not JSON: {exc}", ask.span, shape) from None
    if not isinstance(value, dict):
        raise bad("is not an object", ask.span, shape)
    if ask.field not in value:
        keys = ", ".join(f"`{k}`" for k in list(value)[:6])
        raise bad(f"has no field `{ask.field}`", ask.field_span, f'its fields are {keys}: write `field = "..."`' if keys else shape)
    if not isinstance(value[ask.field], str):
        raise bad(f"has no text in the field `{ask.field}`", ask.field_span, "the field must hold a string")
    text: str = value[ask.field]
    return text


def _picked(ask: Ask, order: list[int], want: int) -> Iterator[str]:
    """Texts in the chosen order. The file is read once more; a few more than wanted are kept for those without tokens."""
    chosen = order if want == len(order) else order[: min(len(order), want + max(16, want // 8))]
    place = {number: i for i, number in enumerate(chosen)}
    found: list[str] = [""] * len(chosen)
    for number, text in enumerate(texts(ask)):
        if number in place:
            found[place[number]] = text
    given = 0
    for text in found:
        if given == want:
            return
        yield text
        given += 1


def _length(ask: Ask, program: Program) -> int:
    limit = longest(program)
    if ask.length is None:
        return min(512, limit)
    if ask.length > limit:
        raise fail(
            "S0756", f"samples of {ask.length} tokens are asked for and the model has {limit} positions", ask.length_span, "too long",
            help=f"write `length = {limit}` or less",
        )  # fmt: skip
    return ask.length


def longest(program: Program) -> int:
    """How many tokens the model's position table holds: what the config says, less the rows up to the padding id where positions
    are counted from it (the graph compares the ids with it)."""
    config = program.info.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    known = [text.get(k) for k in ("max_position_embeddings", "n_positions", "max_target_positions")]
    sizes = [n for n in known if isinstance(n, int) and n > 0]
    if not sizes:
        return 1 << 20
    ids = next((n for n in program.graph.graph.nodes if n.op == "placeholder" and str(n.target) == "input_ids"), None)
    padding = [n.args[1] for n in (ids.users if ids is not None else ()) if n.target is torch.ops.aten.ne.Scalar]
    offset = 1 + int(padding[0]) if padding and isinstance(padding[0], int) else 0
    return max(1, min(sizes) - offset)


# ---------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """``encode(text, length)`` gives the token ids with the model's own special tokens, at most ``length`` of them."""

    encode: Callable[[str, int], list[int]]
    pad: int


def load_tokenizer(checkpoint: Any, span: Span) -> Tokenizer:
    """The tokenizer beside a checkpoint's config. No network is used and no code of the checkpoint runs. Raises S0748."""
    folder = getattr(checkpoint, "path", None)
    names = {p.name for p in getattr(checkpoint, "tokenizer_files", ()) or ()}
    if folder is None or not names.intersection(TOKENIZERS):
        raise fail(
            "S0748", "the model comes without a tokenizer, so text cannot become its inputs", span, "text needs a tokenizer",
            help='put the tokenizer files beside the config, or give token ids: `tensors("ids.safetensors")` with a tensor `input_ids`',
        )  # fmt: skip
    folder = Path(folder)
    try:
        return _of_transformers(folder)
    except Exception as first:
        try:
            return _of_file(folder / "tokenizer.json")
        except Exception:
            why = (str(first).strip().splitlines() or [type(first).__name__])[0]
            raise fail(
                "S0748", f"the tokenizer of the model cannot be loaded: {why[:200]}", span, "text needs a tokenizer",
                help="a tokenizer must be one that transformers knows or have a tokenizer.json; else give token ids with `tensors(...)`",
            ) from None  # fmt: skip


def _of_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)
    pad = next((i for i in (made.pad_token_id, made.eos_token_id) if isinstance(i, int)), 0)
    return Tokenizer(lambda text, length: list(made(text, truncation=True, max_length=length, verbose=False)["input_ids"]), pad)


def _of_file(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    made = Fast.from_file(str(path))
    made.no_padding()

    def encode(text: str, length: int) -> list[int]:
        made.enable_truncation(length)
        return list(made.encode(text).ids)

    return Tokenizer(encode, 0)
