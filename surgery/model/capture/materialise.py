"""A captured graph with weights in it, ready to run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.model.capture.pipeline import Captured
from surgery.model.retarget import retarget


def clone_tree(root: fx.GraphModule) -> fx.GraphModule:
    """A tree with graphs of its own and its own module objects; tensors are shared with ``root``.

    ``copy.deepcopy`` of a GraphModule forgets parameters that no graph reads and which buffers are temporary; this does not.
    """
    memo: dict[int, nn.Module] = {}
    result = _clone(root, memo)
    assert isinstance(result, fx.GraphModule)
    return result


def _clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, fx.GraphModule):
        new: nn.Module = fx.GraphModule(nn.Module(), fx.Graph())
        new.meta.update(module.meta)  # type: ignore[union-attr,arg-type]
    else:
        new = object.__new__(type(module))
        new.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("_") or k == "_is_full_backward_hook"})
        for table in [k for k, v in module.__dict__.items() if k.startswith("_") and k not in new.__dict__]:
            value = module.__dict__[table]
            new.__dict__[table] = value.copy() if isinstance(value, (dict, set)) else value
        new.__dict__["_modules"] = {}
    memo[id(module)] = new
    new.training = module.training
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _clone(child, memo)
    if isinstance(module, fx.GraphModule):
        assert isinstance(new, fx.GraphModule)
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        graph.output_node().meta = dict(module.graph.output_node().meta)
        new.graph = graph
    return new


def materialise(
    captured: Captured, state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> fx.GraphModule:
    """A running copy of the captured tree in ``dtype``: tensors of ``state_dict`` by name (aliases may be absent), constants
    set, graphs retargeted, in eval mode. Parameters are new objects that share storage with ``state_dict`` where dtype and
    device allow. Raises S0507 for a missing tensor or a wrong shape.
    """
    gm = clone_tree(captured.graph)
    retarget(gm, dtype=dtype, device=device)
    made: dict[int, Tensor] = {}
    for path, module in gm.named_modules():
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    made[id(old)] = _filled(captured, state_dict, prefix + key, old, dtype, device)
                table[key] = made[id(old)]  # type: ignore[assignment]
    return gm.eval()


def _filled(captured: Captured, state_dict: Mapping[str, Tensor], name: str, old: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    first = captured.aliases.get(name, name)
    names = [name, first, *(a for a, f in captured.aliases.items() if f == first)]
    value = next((state_dict[n] for n in names if n in state_dict), None)
    if value is None:
        value = captured.constants.get(name)
    if value is None:
        raise fail("S0507", f"there is no tensor for {name!r}", help="the checkpoint must hold every tensor of the model")
    if tuple(value.shape) != tuple(old.shape):
        raise fail(
            "S0507", f"the tensor for {name!r} has shape {list(value.shape)}, the model has {list(old.shape)}",
            help="the checkpoint and the config must belong together",
        )  # fmt: skip
    kind = dtype if old.dtype == torch.bfloat16 else old.dtype
    value = value.detach().to(device=device, dtype=kind)
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
