"""Standing the templates up as modules on meta tensors at the original paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.model.capture.normalise import Leaf
from surgery.model.capture.template import Template
from surgery.model.lazygraph import empty


class Tensors:
    """The model's parameters and buffers as fresh meta tensors: one object for each tensor, however many names it has.

    ``dtypes`` maps a parameter's own dtype to the one it is written in.
    """

    def __init__(self, model: nn.Module, requires_grad: dict[str, bool]) -> None:
        self.aliases: dict[str, str] = {}
        self.first: dict[str, str] = {}
        self.all_names: dict[str, list[str]] = {}
        self.temporary: set[str] = set()
        self.made: dict[str, Tensor] = {}
        by_id: dict[int, str] = {}
        for name, tensor, temporary in named_tensors(model):
            first = by_id.setdefault(id(tensor), name)
            self.first[name] = first
            self.all_names.setdefault(first, []).append(name)
            if temporary:
                self.temporary.add(name)
            elif first != name:
                self.aliases[name] = first
            if first == name:
                meta = torch.empty_like(tensor, device="meta", requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    meta = nn.Parameter(meta, requires_grad=requires_grad.get(name, True) and meta.is_floating_point())
                self.made[name] = meta

    def of(self, name: str) -> Tensor:
        return self.made[self.first[name]]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(full name, tensor, not persistent) in state-dict order, every name of a shared tensor."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, False
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield prefix + name, buffer, name in module._non_persistent_buffers_set


def stand_up(root: Template, tensors: Tensors, model: nn.Module, lifted: dict[str, Tensor]) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The tree of GraphModules and the lifted constants by full name."""
    constants: dict[str, Tensor] = {}
    gm = _module(root, "", root.path, tensors, model, lifted, constants)
    for path, template in root.layers.items():
        place(gm, path, _module(template, path, template.path, tensors, model, lifted, constants))
    for name in tensors.first:  # what no graph reads still belongs to the model's state
        if lookup(gm, name) is None:
            _put(gm, name, tensors.of(name), name not in tensors.temporary)
    gm.recompile()
    return gm, constants


def _module(
    template: Template,
    path: str,
    original: str,
    tensors: Tensors,
    model: nn.Module,
    lifted: dict[str, Tensor],
    constants: dict[str, Tensor],
) -> fx.GraphModule:
    gm = empty()
    prefix = f"{path}." if path else ""
    for target, leaf in template.leaves.items():
        place(gm, target, _leaf(leaf, prefix + target, original, path, tensors, model))
    for name in template.tensors:
        if lookup(gm, name) is None:
            full = prefix + name
            _put(gm, name, tensors.of(full), full not in tensors.temporary)
    for name, key in template.constants.items():
        value = lifted[key]
        _put(gm, name, torch.empty_like(value, device="meta"), False)
        constants[prefix + name] = value
    graph = fx.Graph()
    graph.output(graph.graph_copy(template.graph, {}), type_expr=None)
    graph.output_node().meta = dict(template.graph.output_node().meta)
    gm.graph = graph
    return gm


def _leaf(leaf: Leaf, full: str, original: str, path: str, tensors: Tensors, model: nn.Module) -> nn.Module:
    """A leaf at its place. Twins share a template, so names and rates are those of the place, not of the template."""
    arguments = dict(leaf.arguments)
    own = _submodule(model, full)
    if set(arguments) == {"p"} and own is not None:
        for key in ("p", "drop_prob"):
            if isinstance(getattr(own, key, None), (int, float)):
                arguments["p"] = float(getattr(own, key))
                break
    if leaf.tensors:
        with torch.device("meta"):
            module = torch.nn.utils.skip_init(leaf.cls, **arguments, device="meta")
    else:
        module = leaf.cls(**arguments)
    for attribute, name in leaf.tensors.items():
        if original and name.startswith(f"{original}."):
            name = f"{path}{name[len(original) :]}"
        tensor = tensors.of(name)
        if attribute in module._parameters:
            module._parameters[attribute] = tensor  # type: ignore[assignment]
        else:
            module._buffers[attribute] = tensor
    return module


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    at: Any = model
    for part in path.split("."):
        at = at._modules.get(part) if isinstance(at, nn.Module) else None
        if at is None:
            return None
    return at


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Sets ``module`` at ``path`` below ``root``; what already stands there (tensors that the parent reads) moves into it."""
    *parents, name = path.split(".")
    at = root
    for part in parents:
        if part not in at._modules:
            at._modules[part] = nn.Module()
        at = at._modules[part]  # type: ignore[assignment]
    old = at._modules.get(name)
    if old is not None:
        _merge(old, module)
    at._modules[name] = module


def _merge(old: nn.Module, new: nn.Module) -> None:
    for key, parameter in old._parameters.items():
        new._parameters.setdefault(key, parameter)
    for key, buffer in old._buffers.items():
        if key not in new._buffers:
            new.register_buffer(key, buffer, persistent=key not in old._non_persistent_buffers_set)
    for key, child in old._modules.items():
        if child is not None:
            if key in new._modules and new._modules[key] is not None:
                _merge(child, new._modules[key])  # type: ignore[arg-type]
            else:
                new._modules[key] = child


def lookup(root: nn.Module, name: str) -> Tensor | None:
    """The tensor called ``name`` below ``root``, None if nothing stands there."""
    path, _, last = name.rpartition(".")
    module = _submodule(root, path) if path else root
    if module is None:
        return None
    found = module._parameters.get(last)
    return found if found is not None else module._buffers.get(last)


def _put(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    path, _, last = name.rpartition(".")
    at = root
    for part in path.split(".") if path else ():
        if at._modules.get(part) is None:
            at._modules[part] = nn.Module()
        at = at._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        at._parameters[last] = tensor
    else:
        at.register_buffer(last, tensor, persistent=persistent)
