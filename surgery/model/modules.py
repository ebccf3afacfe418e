"""Which module classes may stand in a stored graph, and how each is written down and built again.

A class of torch is listed here with the attributes that its constructor needs. A class of ours has ``module_config()`` (plain
data) and a class method ``from_config(config)`` and is registered under a tag with :func:`register_module`. Tags of classes
that live in packages this one may not import (what methods attach) are found through the resolver of
:func:`set_module_resolver`. A file can name tags only, never a Python path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from surgery.core.diagnostics import fail


@runtime_checkable
class ConfiguredModule(Protocol):
    """What a registered module class offers."""

    def module_config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> nn.Module: ...


Resolver = Callable[[str], "type[nn.Module] | None"]
_BY_TAG: dict[str, type[nn.Module]] = {}
_TAG_OF: dict[type[nn.Module], str] = {}
_RESOLVERS: list[Resolver] = []


def register_module(tag: str, cls: type[nn.Module]) -> type[nn.Module]:
    """Make ``cls`` storable under ``tag``. Registering a second class under a tag is a programming error (ValueError)."""
    known = _BY_TAG.get(tag)
    if known is not None and known is not cls and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"module tag {tag!r} already names {known.__qualname__}")
    if tag in TORCH_MODULES or not (hasattr(cls, "module_config") and hasattr(cls, "from_config")):
        raise ValueError(f"{cls.__qualname__} needs module_config and from_config, and a tag of its own")
    _BY_TAG[tag] = cls
    _TAG_OF[cls] = tag
    return cls


def registered(tag: str) -> bool:
    """Whether a class is registered under this tag by now."""
    return tag in _BY_TAG


def set_module_resolver(resolver: Resolver) -> None:
    """Ask ``resolver(tag)`` for classes that are not registered yet; the first resolver with an answer wins."""
    if resolver not in _RESOLVERS:
        _RESOLVERS.append(resolver)


@dataclass(frozen=True)
class TorchModule:
    """A torch class: constructor arguments read from attributes; ``bias`` and the like are whether the attribute is set."""

    cls: type[nn.Module]
    attributes: tuple[str, ...]
    present: tuple[str, ...] = ()
    typed: bool = True

    def config(self, module: nn.Module) -> dict[str, Any]:
        found = {name: getattr(module, name) for name in self.attributes}
        found |= {name: getattr(module, name, None) is not None for name in self.present}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def build(self, config: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
        if set(config) != {*self.attributes, *self.present}:
            raise ValueError(f"{self.cls.__name__} is not built from {sorted(config)}")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        if any(not _plain(v) for v in given.values()):
            raise ValueError(f"{self.cls.__name__} is built from plain values")
        if not self.typed:
            return self.cls(**given)
        return twin(_first_of(self.cls, tuple(sorted(given.items())), dtype))  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _first_of(cls: type[nn.Module], given: tuple[tuple[str, Any], ...], dtype: torch.dtype | None) -> nn.Module:
    """One module of each kind: deep models have hundreds of equal leaves.

    Nothing is drawn for it: meta tensors hold no values, and torch's way of drawing none imports its whole compiler.
    """
    bare = type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    made: nn.Module = bare(**dict(given), device="meta", dtype=dtype)
    made.__class__ = cls
    return made


def twin(module: nn.Module) -> nn.Module:
    """An independent module like this leaf, with meta tensors of its own."""
    made = module.__class__.__new__(module.__class__)
    made.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            made._parameters[name] = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            made._buffers[name] = torch.empty_like(buffer)
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return made


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, (bool, int)) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

TORCH_MODULES: dict[str, TorchModule] = {
    "nn.Linear": TorchModule(nn.Linear, ("in_features", "out_features"), ("bias",)),
    "nn.Embedding": TorchModule(nn.Embedding, _EMBEDDING),
    "nn.LayerNorm": TorchModule(nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine"), ("bias",)),
    "nn.RMSNorm": TorchModule(nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "nn.GroupNorm": TorchModule(nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "nn.Conv1d": TorchModule(nn.Conv1d, _CONV, ("bias",)),
    "nn.Conv2d": TorchModule(nn.Conv2d, _CONV, ("bias",)),
    "nn.Conv3d": TorchModule(nn.Conv3d, _CONV, ("bias",)),
    "nn.BatchNorm1d": TorchModule(nn.BatchNorm1d, _BATCH_NORM),
    "nn.BatchNorm2d": TorchModule(nn.BatchNorm2d, _BATCH_NORM),
    "nn.BatchNorm3d": TorchModule(nn.BatchNorm3d, _BATCH_NORM),
    "nn.Dropout": TorchModule(nn.Dropout, ("p", "inplace"), typed=False),
    "nn.Dropout1d": TorchModule(nn.Dropout1d, ("p", "inplace"), typed=False),
    "nn.Dropout2d": TorchModule(nn.Dropout2d, ("p", "inplace"), typed=False),
    "nn.Dropout3d": TorchModule(nn.Dropout3d, ("p", "inplace"), typed=False),
    "nn.AlphaDropout": TorchModule(nn.AlphaDropout, ("p", "inplace"), typed=False),
    "nn.Identity": TorchModule(nn.Identity, (), typed=False),
}
_CAPTURED = {
    "surgery.attention": ("Attention", ("p", "is_causal", "scale", "enable_gqa")),
    "surgery.drop_path": ("DropPath", ("p",)),
    "surgery.jitter": ("Jitter", ("low", "high")),
}


def _captured_leaves() -> None:
    """List the modules that capture puts into graphs, as if they were of torch: their constructors take these attributes."""
    from surgery.model.capture import leaves

    for tag, (name, attributes) in _CAPTURED.items():
        entry = TorchModule(getattr(leaves, name), attributes, typed=False)
        TORCH_MODULES[tag] = entry
        _TORCH_TAG[entry.cls] = tag


_TORCH_TAG = {entry.cls: tag for tag, entry in TORCH_MODULES.items()}
SCOPES = (nn.Module, nn.ModuleList, nn.Sequential, nn.ModuleDict)
"""Classes that only hold other modules; they come back as plain ``nn.Module``."""


def tag_of(module: nn.Module) -> str | None:
    """The tag of a module's exact class, or None."""
    return _TORCH_TAG.get(type(module)) or _TAG_OF.get(type(module))


def config_of(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Tag and configuration of a leaf module. Raises S0825 for a class that is not registered."""
    if type(module).__module__ == "surgery.model.capture.leaves" and type(module) not in _TORCH_TAG:
        _captured_leaves()
    tag = _TORCH_TAG.get(type(module))
    if tag is not None:
        return tag, TORCH_MODULES[tag].config(module)
    tag = _TAG_OF.get(type(module))
    if tag is None:
        raise fail(
            "S0825", f"modules of class {type(module).__module__}.{type(module).__qualname__} cannot be stored",
            help="register the class with surgery.model.modules.register_module, or capture the model without it",
        )  # fmt: skip
    return tag, cast(ConfiguredModule, module).module_config()


def build(tag: str, config: dict[str, Any], dtype: torch.dtype | None, resolver: Resolver | None = None) -> nn.Module:
    """A leaf module on the meta device. Raises S0825 for an unknown tag; ValueError or TypeError for a wrong configuration."""
    if tag in _CAPTURED and tag not in TORCH_MODULES:
        _captured_leaves()
    entry = TORCH_MODULES.get(tag)
    if entry is not None:
        return entry.build(config, dtype)
    cls = find(tag, resolver)
    if cls is None:
        raise fail(
            "S0825", f"the graph uses the module class {tag[:80]!r}, which this surgery does not know",
            help="install the surgery version or the method package that wrote the artifact",
        )  # fmt: skip
    with torch.device("meta"):
        return cast(type[ConfiguredModule], cls).from_config(config)


def find(tag: str, resolver: Resolver | None = None) -> type[nn.Module] | None:
    """The registered class of a tag, asking the resolvers when it is new."""
    for ask in (*([resolver] if resolver else []), *_RESOLVERS):
        if tag in _BY_TAG:
            break
        found = ask(tag)
        if found is not None and tag not in _BY_TAG:
            register_module(tag, found)
    return _BY_TAG.get(tag)
