"""Reading a site's call in the graph: which node it is, what its input is, how a convolution is set up."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from surgery.core.site import Site
from surgery.model.program import Program

_CONV_ARGS = ("stride", "padding", "dilation", "groups")


def calls_of(program: Program, site: Site) -> list[tuple[str, fx.Node]]:
    """The nodes that use a site's weight, with the path of their GraphModule; for expert tensors the nodes that read it.

    A site's own ``calls`` are used when there are any, so that a tied weight's other uses stay out of it.
    """
    if site.op in ("experts", "expert"):
        return _readers(program, own_name(program, site))
    return [(ref.graph, program.node(ref)) for ref in site.calls]


def own_name(program: Program, site: Site) -> str:
    """The name that a site's weight has where the site stands: layers that share a weight each have a name for it."""
    names = (site.weight, *(k for k, v in program.aliases.items() if v == site.weight))
    return next((n for n in names if n.rpartition(".")[0] == site.path), site.weight)


def _readers(program: Program, name: str) -> list[tuple[str, fx.Node]]:
    found = []
    parts = name.split(".")
    for n in range(len(parts)):  # only the graphs around a tensor can read it
        path = ".".join(parts[:n])
        module = program.module(path)
        if isinstance(module, fx.GraphModule):
            found += [(path, node) for node in module.graph.find_nodes(op="get_attr", target=".".join(parts[n:]))]
    return found


def weight_of(graph: str, node: fx.Node) -> str:
    """The name under which a call (or a node that reads an expert tensor) has its weight; tied weights have a name per use."""
    if node.op == "call_module":
        return _join(graph, f"{node.target}.weight")
    while node.op != "get_attr":
        name = str(node.target)
        at = 2 if "addmm" in name else 0 if "embedding" in name or len(node.all_input_nodes) == 1 else 1
        value = node.args[at]
        assert isinstance(value, fx.Node)
        node = value
    return _join(graph, str(node.target))


def weight_names(program: Program, site: Site) -> tuple[str, ...]:
    """All names that a site's own calls have for its weight, first call first."""
    found = tuple(dict.fromkeys(weight_of(graph, node) for graph, node in calls_of(program, site)))
    return found or (site.weight,)


def ties_outside(program: Program, names: tuple[str, ...]) -> list[str]:
    """The other names of the weight that ``names`` share; none when nothing in the graph uses any of them (the ``shared`` of an
    encoder-decoder only names the table that both embeddings read)."""
    first = program.aliases.get(names[0], names[0])
    others = [n for n in (first, *(k for k, v in program.aliases.items() if v == first)) if n not in names]
    return others if any(_used(program, n) for n in others) else []


def _used(program: Program, name: str) -> bool:
    if _readers(program, name):
        return True
    parts = name.split(".")[:-1]
    for n in range(len(parts)):
        module = program.module(".".join(parts[:n]))
        if isinstance(module, fx.GraphModule) and module.graph.find_nodes(op="call_module", target=".".join(parts[n:])):
            return True
    return False


def _join(graph: str, name: str) -> str:
    return f"{graph}.{name}" if graph else name


def operand(node: fx.Node) -> fx.Node:
    """The activation (or ids) that a linear, convolution or embedding node takes."""
    if node.op == "call_module":
        value = node.args[0] if node.args else node.kwargs["input"]
    else:
        name = str(node.target)
        at = 1 if "embedding" in name or "addmm" in name else 0
        value = node.args[at]
    assert isinstance(value, fx.Node)
    return value


def call_config(program: Program, graph: str, node: fx.Node) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution, padding index of an embedding; empty for others."""
    if node.op == "call_module":
        module = program.module(_join(graph, str(node.target)))
        if isinstance(module, nn.Linear):
            return {}
        if isinstance(module, nn.Embedding):
            return {"padding_idx": module.padding_idx}
        return {k: getattr(module, k) for k in _CONV_ARGS if hasattr(module, k)}
    name = str(node.target)
    if "conv" in name:
        return dict(zip(_CONV_ARGS, node.args[3:7], strict=False)) | {k: v for k, v in node.kwargs.items() if k in _CONV_ARGS}
    if "embedding" in name and len(node.args) > 2:
        index = node.args[2]
        return {"padding_idx": None if index == -1 else index}
    return {}
