"""Trees of values as plain data: how the flat inputs and outputs of a graph nest, and which classes they build.

A tree is JSON: ``{"type": "tensor"}``, ``{"type": "const", "value": ...}``, ``{"type": "list" | "tuple", "items": [...]}``,
``{"type": "dict", "keys": [...], "items": [...]}``, ``{"type": "output", "class": "module:Name", "keys", "items"}`` (a
transformers ``ModelOutput``) and ``{"type": "cache", "class": "DynamicCache" | "EncoderDecoderCache", "layers": n}``, whose
leaves are all keys, then all values (of the self-attention part, then of the cross-attention part).

Why not torch's own ``treespec_loads``: it imports whatever module a file names. Here a class is found only if it is a cache
listed below or a ``ModelOutput`` defined by transformers, and nothing outside ``transformers`` is ever imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from surgery.core.diagnostics import SurgeryError, fail

Tree = dict[str, Any]

CACHES = ("DynamicCache", "EncoderDecoderCache")
_OUTPUT_MODULE = re.compile(r"transformers\.(modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+)")
_CONSTANTS = (bool, int, float, str, type(None))
_MAX_DEPTH = 32


def _refuse(what: str) -> SurgeryError:
    return fail("S0829", what, help="a surgery artifact only names output classes of transformers; emit the artifact again from its spec")


def _allowed(name: str) -> tuple[str, str]:
    """Module and class of ``module:Class``; raises S0829 for a module that is not one of transformers' own modeling files."""
    module, _, cls_name = name.partition(":")
    if not _OUTPUT_MODULE.fullmatch(module) or not cls_name.isidentifier():
        raise _refuse(f"the output class {name!r} is not one of transformers' output classes")
    return module, cls_name


@cache
def output_class(name: str) -> type[Any]:
    """The ``ModelOutput`` subclass behind ``module:Class``.

    Raises S0829 unless the module is one of transformers' own modeling files and defines a ModelOutput of that name.
    """
    module, cls_name = _allowed(name)
    from transformers.utils import ModelOutput

    try:
        found = getattr(sys.modules.get(module) or importlib.import_module(module), cls_name, None)
    except ImportError:
        found = None
    if not isinstance(found, type) or not issubclass(found, ModelOutput) or found.__module__ != module:
        raise _refuse(f"this transformers has no output class {name!r}")
    return found


def spec_of(value: Any) -> Tree:
    """The tree of a nested value. Raises S0830 for a value that no tree can describe."""
    if isinstance(value, torch.Tensor):
        return {"type": "tensor"}
    if isinstance(value, _CONSTANTS):
        return {"type": "const", "value": value}
    if isinstance(value, (torch.dtype, torch.device)):
        raise fail("S0830", f"the constant {value!r} cannot stand in a signature", help="pass it as a fixed argument of a wrapper module")
    name = type(value).__name__
    if name in CACHES and type(value).__module__ == "transformers.cache_utils":
        return {"type": "cache", "class": name, "layers": len(_parts(value)[0].layers)}
    if _is_output(value):
        keys = list(value.keys())
        return {
            "type": "output", "class": f"{type(value).__module__}:{name}", "keys": keys, "items": [spec_of(value[k]) for k in keys],
        }  # fmt: skip
    if type(value) in (list, tuple):
        return {"type": type(value).__name__, "items": [spec_of(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"type": "dict", "keys": list(value), "items": [spec_of(v) for v in value.values()]}
    raise fail(
        "S0830", f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be an input or output of a captured model",
        help="use tensors, numbers, strings, lists, tuples, dicts with string keys, a DynamicCache or transformers' output classes",
    )  # fmt: skip


def _is_output(value: Any) -> bool:
    modeling = sys.modules.get("transformers.utils.generic")
    return modeling is not None and isinstance(value, modeling.ModelOutput)


def _parts(value: Any) -> list[Any]:
    """The single caches of a cache."""
    if type(value).__name__ == "EncoderDecoderCache":
        return [value.self_attention_cache, value.cross_attention_cache]
    return [value]


def leaves_in(spec: Tree) -> int:
    """How many tensors the tree has."""
    kind = spec["type"]
    if kind == "tensor":
        return 1
    if kind == "cache":
        return 2 * spec["layers"] * (2 if spec["class"] == "EncoderDecoderCache" else 1)
    return sum(leaves_in(item) for item in spec.get("items", ()))


def check(spec: Any, depth: int = 0, *, classes: bool = True) -> Tree:
    """``spec`` itself once it is known to be a well-formed tree with allowed classes; raises S0826 or S0829.

    Without ``classes`` an output class is only known to have an allowed name; that it exists is seen when an output is built.
    """

    def bad(why: str) -> SurgeryError:
        return fail("S0826", f"the stored signature is damaged: {why}", help="emit the artifact again from its spec")

    if depth > _MAX_DEPTH:
        raise bad("it nests too deep")
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise bad(f"{str(spec)[:60]!r} is not a tree")
    kind, items = spec["type"], spec.get("items", [])
    if kind == "const":
        if "value" not in spec or not isinstance(spec["value"], _CONSTANTS):
            raise bad("a constant is not a plain value")
    elif kind == "cache":
        if spec.get("class") not in CACHES:
            raise _refuse(f"the cache class {str(spec.get('class'))[:60]!r} is not one that surgery rebuilds")
        if type(spec.get("layers")) is not int or not 0 <= spec["layers"] <= 100_000:
            raise bad("a cache has no number of layers")
    elif kind in ("dict", "output", "list", "tuple"):
        if not isinstance(items, list):
            raise bad(f"a {kind} has no items")
        if kind in ("dict", "output"):
            keys = spec.get("keys")
            if (
                not isinstance(keys, list)
                or len(keys) != len(items)
                or not all(isinstance(k, str) for k in keys)
                or len(set(keys)) != len(keys)
            ):
                raise bad(f"a {kind} does not have one key for each item")
        if kind == "output":
            (output_class if classes else _allowed)(str(spec.get("class")))
        for item in items:
            check(item, depth + 1, classes=classes)
    elif kind != "tensor":
        raise bad(f"unknown kind {kind[:40]!r}")
    return spec


def _mismatch(path: str, want: str, got: Any) -> SurgeryError:
    have = f"a {type(got).__name__}" if got is not None else "nothing"
    return fail("S0835", f"input {path or 'value'} should be {want}, it is {have}", help="call the module as the original model was called when it was captured")  # fmt: skip


def flatten(value: Any, spec: Tree, path: str = "") -> list[torch.Tensor]:
    """The tensors of ``value`` in the tree's order. Raises S0835 where the value does not nest like the tree."""
    kind = spec["type"]
    if kind == "tensor":
        if not isinstance(value, torch.Tensor):
            raise _mismatch(path, "a tensor", value)
        return [value]
    if kind == "const":
        if value is not spec["value"] and value != spec["value"]:
            raise _mismatch(path, f"{spec['value']!r} as at capture", value)
        return []
    if kind == "cache":
        return _flatten_cache(value, spec, path)
    items = spec["items"]
    if kind in ("list", "tuple"):
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise _mismatch(path, f"a {kind} of {len(items)}", value)
        return [leaf for i, item in enumerate(items) for leaf in flatten(value[i], item, f"{path}[{i}]")]
    if not isinstance(value, dict) or any(k not in value for k in spec["keys"]):
        raise _mismatch(path, "a dict with " + ", ".join(spec["keys"]), value)
    return [leaf for k, item in zip(spec["keys"], items, strict=True) for leaf in flatten(value[k], item, f"{path}.{k}" if path else k)]


def _flatten_cache(value: Any, spec: Tree, path: str) -> list[torch.Tensor]:
    if type(value).__name__ != spec["class"]:
        raise _mismatch(path, f"a {spec['class']}", value)
    flat: list[torch.Tensor] = []
    for part in _parts(value):
        layers = part.layers
        if len(layers) != spec["layers"] or any(getattr(la, "keys", None) is None for la in layers):
            raise _mismatch(path, f"a filled cache of {spec['layers']} layers", value)
        flat += [la.keys for la in layers]
        flat += [la.values for la in layers]
    return flat


def unflatten(leaves: Sequence[Any] | Iterator[Any], spec: Tree) -> Any:
    """The nested value of a tree from its leaves (as many as :func:`leaves_in` says)."""
    stream = iter(leaves)
    return _build(stream, spec)


def _build(stream: Iterator[Any], spec: Tree) -> Any:
    kind = spec["type"]
    if kind == "tensor":
        return next(stream)
    if kind == "const":
        return spec["value"]
    if kind == "cache":
        return _build_cache(stream, spec)
    items = [_build(stream, item) for item in spec["items"]]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    named = dict(zip(spec["keys"], items, strict=True))
    return named if kind == "dict" else output_class(spec["class"])(**named)


def _build_cache(stream: Iterator[Any], spec: Tree) -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    def single() -> Any:
        keys = [next(stream) for _ in range(spec["layers"])]
        values = [next(stream) for _ in range(spec["layers"])]
        return fill_cache(DynamicCache(), keys, values)

    return single() if spec["class"] == "DynamicCache" else EncoderDecoderCache(single(), single())


def fill_cache(cache: Any, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
    """Put whole key and value tensors ``[batch, heads, length, width]`` into a ``DynamicCache``, layer by layer, without a copy.

    Layers that the cache lacks are added; what a layer held before is replaced (the values already contain it).
    """
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) < len(keys):
        cache.layers.append(DynamicLayer())
    for layer, key, value in zip(cache.layers, keys, values, strict=False):
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
    return cache
