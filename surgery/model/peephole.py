"""What the running module does differently from the recorded graph, with the same result: less copied, less kept.

The recorded graph serves every length of a cache and every mask and states repeated key heads; at run time an empty cache needs
no concatenation, the attention kernel reads grouped heads as they are, a mask that masks nothing is left out, a frozen
projection and its adapter are one step, and experts are torch's own kernel where it takes them. The stored graph, analyses and exports never see this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.model.attend import attend
from surgery.model.grouped import product

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """``cat([past, new], dim)``, without the copy while the cache is empty."""
    if past.shape[dim] == 0 and past.dtype == new.dtype:
        return new
    return torch.cat([past, new], dim)


def beside(base: nn.Module, added: nn.Module, x: Tensor) -> Tensor:
    """``added(x, base(x))``; by the way that ``added`` has for both together while nobody looks between them."""
    together = getattr(added, "with_base", None)
    if together is not None and not torch.compiler.is_compiling() and not _watched(base) and not _watched(added):
        out: Tensor | None = together(x, base)
        if out is not None:
            return out
    result: Tensor = added(x, base(x))
    return result


def _watched(module: nn.Module) -> bool:
    """Whether hooks of this module, or of all modules, want to see its call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook()
    )  # fmt: skip


def tune(graph: fx.Graph) -> None:
    """Rewrites a copy of a recorded graph in place."""
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            _append(graph, node)
        elif node.target is torch.ops.surgery.grouped_mm.default:
            node.target = product
        elif node.op == "call_module":
            _join(graph, node)
    for node in list(graph.nodes):
        if node.target is _SDPA:
            _group(graph, node)
            if len(node.args) > 3 or "attn_mask" in node.kwargs:
                node.target = attend
                node.kwargs = {("mask" if k == "attn_mask" else k): v for k, v in node.kwargs.items()}


def _join(graph: fx.Graph, node: fx.Node) -> None:
    """``added(x, base(x))``, where nothing else reads ``base(x)``."""
    if len(node.args) != 2 or node.kwargs:
        return
    x, out = node.args
    if not isinstance(x, fx.Node) or not isinstance(out, fx.Node) or out.op != "call_module":
        return
    if out.args != (x,) or out.kwargs or set(out.users) != {node}:
        return
    with graph.inserting_before(node):
        modules = [graph.create_node("get_attr", str(n.target)) for n in (out, node)]
        made = graph.call_function(beside, (*modules, x))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    graph.erase_node(out)


def _append(graph: fx.Graph, node: fx.Node) -> None:
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(p, fx.Node) for p in parts):
        return
    past, new = parts
    if past.op != "placeholder" or not _cache_like(past, node):  # type: ignore[union-attr]
        return
    with graph.inserting_before(node):
        made = graph.call_function(append, (past, new, dim))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _cache_like(past: fx.Node, joined: fx.Node) -> bool:
    """A placeholder that only grows here and whose grown form the graph gives back."""
    return len(past.users) == 1 and any(u.op == "output" for u in joined.users)


def _group(graph: fx.Graph, node: fx.Node) -> None:
    """``sdpa(q, repeat(k), repeat(v))`` reads ``k`` and ``v`` themselves."""
    if len(node.args) < 3 or node.kwargs.get("enable_gqa") or node.kwargs.get("dropout_p") or len(node.args) > 4:
        return
    sources = [_repeated(a) for a in node.args[1:3]]
    if sources[0] is None or sources[1] is None:
        return
    k, v = sources
    old = node.args[1:3]
    node.args = (node.args[0], k, v, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}
    for tensor in old:
        for dead in _chain(tensor):
            if not dead.users:
                graph.erase_node(dead)


def _chain(node: Any) -> list[fx.Node]:
    """reshape <- expand <- unsqueeze, outermost first."""
    found = [node]
    for _ in range(2):
        found.append(found[-1].args[0])
    return found


def _repeated(node: Any) -> fx.Node | None:
    """The tensor [batch, groups, length, width] behind ``reshape(expand(unsqueeze(x, 2)))``, None for anything else."""
    if not isinstance(node, fx.Node) or node.target is not aten.reshape.default:
        return None
    wide = node.args[0]
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return None
    thin = wide.args[0]
    if not isinstance(thin, fx.Node) or thin.target is not aten.unsqueeze.default or thin.args[1] != 2:
        return None
    sizes = wide.args[1]
    if not isinstance(sizes, list | tuple) or len(sizes) != 5 or not isinstance(sizes[2], int) or sizes[2] < 2:
        return None
    if [s for i, s in enumerate(sizes) if i != 2] != [-1] * 4:
        return None
    source = thin.args[0]
    return source if isinstance(source, fx.Node) else None
