"""The config of a checkpoint: read, checked, and turned into a model on the meta device. No code of a checkpoint runs."""

from __future__ import annotations

import importlib.util
import json
import re
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.checkpoint_headers import unreadable

if TYPE_CHECKING:
    from surgery.model.checkpoint import Checkpoint

MAX_CONFIG = 64_000_000
"""Longest config that is read, in bytes."""


def read_config(path: Path, span: Span | None = None) -> dict[str, Any]:
    """The config file as plain data. S0702 when it is missing or no JSON object, S0721 when it cannot be read."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise fail(
                "S0702",
                f"{path.name} has {path.stat().st_size} bytes, which is no config",
                span,
                notes=(f"file: {path}",),
                help="fetch it again",
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise fail("S0702", f"there is no {path.name} in {path.parent}", span, help="put the model's config.json there") from None
    except OSError as exc:
        raise unreadable(path, exc, span) from None
    try:
        config = json.loads(raw.decode("utf-8"), object_hook=_tagged_float)
    except (UnicodeDecodeError, ValueError, RecursionError) as exc:
        raise fail(
            "S0702", f"{path.name} is not JSON: {exc}", span, notes=(f"file: {path}",), help="fetch it again from where the weights came"
        ) from None
    if not isinstance(config, dict):
        raise fail(
            "S0702", f"{path.name} is not a JSON object", span, notes=(f"file: {path}",), help="fetch it again from where the weights came"
        )
    return config


@lru_cache(maxsize=1)
def known_families() -> tuple[str, ...]:
    """Every ``model_type`` of the installed transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return tuple(CONFIG_MAPPING_NAMES)


@lru_cache(maxsize=1)
def _stated_families() -> frozenset[str]:
    """Families that the installed transformers states as plain data. Reading them takes a thirtieth of the time that importing it takes; the
    list may be short, never wrong."""
    found = importlib.util.find_spec("transformers")
    try:
        text = Path(str(found and found.origin)).with_name("models").joinpath("auto", "auto_mappings.py").read_text("utf-8")
    except OSError:
        return frozenset()  # another layout: the import knows
    table = re.search(r"^CONFIG_MAPPING_NAMES = OrderedDict\($(.*?)^\)$", text, re.M | re.S)
    return frozenset(re.findall(r'^ +\("([^"]+)", "\w+"\),$', table[1], re.M) if table else ())


@lru_cache(maxsize=1)
def _stated_classes() -> frozenset[str]:
    """Model classes that the installed transformers names in its tables of families. One that only stands there is found out when it is built (S0504)."""
    found = importlib.util.find_spec("transformers")
    try:
        text = Path(str(found and found.origin)).with_name("models").joinpath("auto", "modeling_auto.py").read_text("utf-8")
    except OSError:
        return frozenset()
    return frozenset(re.findall(r'^ +\("[\w-]+", "([A-Z]\w+)"\),$', text, re.M))


@lru_cache(maxsize=1)
def _transformers_names() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))


def check_family(config: dict[str, Any], path: Path, span: Span | None = None) -> str:
    """The config's ``model_type``. S0703 when it is missing or unknown, S0704 when only code of the checkpoint knows it, S0725 quantised."""
    note = (f"file: {path}",)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method") if isinstance(config["quantization_config"], dict) else ""
        raise fail(
            "S0725", f"the checkpoint is quantised{f' ({method})' if method else ''}, and surgery works on plain weights", span, notes=note,
            help="name the unquantised checkpoint it was made from",
        )  # fmt: skip
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise fail("S0703", f"{path.name} has no model_type", span, notes=note, help='add the family, for example `"model_type": "llama"`')
    if family in _stated_families() or family in known_families():
        return family
    if config.get("auto_map"):
        raise fail(
            "S0704", f"the family {family!r} is defined by code that comes with the checkpoint", span, notes=note,
            help="surgery never runs code of a checkpoint: build the model yourself and name it `python:package.module:factory` with `--allow-code`",
        )  # fmt: skip
    near = get_close_matches(family, known_families(), 4)
    helps = [f"did you mean {' or '.join(f'`{n}`' for n in near)}?"] if near else []
    raise fail(
        "S0703", f"the family {family!r} is not known to the installed transformers", span, notes=note,
        help=[*helps, "upgrade transformers if the family is newer"],
    )  # fmt: skip


def architecture_of(config: dict[str, Any], path: Path, span: Span | None = None) -> str:
    """The model class: ``architectures[0]``, else the base class of the family. S0723 when transformers has no such class."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        name = named[0]
        if name in _stated_classes() or name in _transformers_names():
            return name
        if config.get("auto_map"):
            raise fail(
                "S0704", f"the model class {name!r} is defined by code that comes with the checkpoint", span, notes=(f"file: {path}",),
                help="surgery never runs code of a checkpoint: build the model yourself and name it `python:package.module:factory` with `--allow-code`",
            )  # fmt: skip
        near = get_close_matches(name, sorted(_transformers_names()), 4)
        helps = [f"did you mean {' or '.join(f'`{n}`' for n in near)}?"] if near else []
        raise fail(
            "S0723",
            f"the installed transformers has no model class {name!r}",
            span,
            notes=(f"file: {path}",),
            help=[*helps, "correct `architectures`"],
        )
    return base_architecture(config["model_type"], path, span)


def base_architecture(family: str, path: Path = Path("config.json"), span: Span | None = None) -> str:
    """The family's class without a head. S0723 when it has none."""
    from transformers.models.auto import modeling_auto

    found = modeling_auto.MODEL_MAPPING_NAMES.get(family)
    if found is None:
        raise fail(
            "S0723",
            f"the family {family!r} has no base model class",
            span,
            notes=(f"file: {path}",),
            help="name the class in `architectures`",
        )
    return str(found[0] if isinstance(found, list | tuple) else found)


def _tagged_float(entry: dict[str, Any]) -> Any:
    """What transformers writes for a number that JSON has no word for, ``{"__float__": "Infinity"}``, as that number."""
    tag = entry.get("__float__") if len(entry) == 1 else None
    return float(tag) if tag in ("Infinity", "-Infinity", "NaN") else entry


def hf_config(checkpoint: Checkpoint, span: Span | None = None) -> Any:
    """The transformers config object. S0722 when transformers refuses the values."""
    from transformers import AutoConfig

    if checkpoint.kind == "python":
        return getattr(checkpoint.module, "config", None)
    data = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(checkpoint.family, **data)
    except Exception as exc:
        raise _refused(checkpoint, exc, span) from exc


def model_class(checkpoint: Checkpoint, span: Span | None = None) -> type:
    """The transformers model class of a checkpoint. S0723 when its modelling code cannot be imported."""
    import transformers

    try:
        return getattr(transformers, checkpoint.architecture)  # type: ignore[no-any-return]
    except Exception as exc:
        raise fail(
            "S0723", f"the model class {checkpoint.architecture!r} cannot be imported: {exc}", span,
            help="install what it needs, or correct `architectures`",
        ) from exc  # fmt: skip


def meta_model(checkpoint: Checkpoint, span: Span | None = None) -> Any:
    """A fresh model of the checkpoint's class on the meta device: shapes and names, no memory. S0722, S0723."""
    import torch

    cls, config = model_class(checkpoint, span), hf_config(checkpoint, span)
    try:
        with torch.device("meta"), torch.no_grad():
            return cls(config)
    except Exception as exc:
        raise _refused(checkpoint, exc, span) from exc


def _refused(checkpoint: Checkpoint, exc: Exception, span: Span | None) -> Exception:
    text = " ".join(str(exc).split())
    return fail(
        "S0722", f"transformers refuses the config of {checkpoint.ref}: {type(exc).__name__}: {text[:300]}", span,
        help="correct the values in config.json",
    )  # fmt: skip
