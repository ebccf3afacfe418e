"""Sites of whole modules, for selectors that are raw module paths, and of bare parameters."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import fx

from surgery.core.site import NodeRef, Site
from surgery.model.anatomy import ops
from surgery.model.anatomy.blocks import whole
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.sites import Builder, Names


def module_sites(view: GraphView, builder: Builder, names: Names) -> tuple[Site, ...]:
    """One site for each module that holds parameters, in state-dict order; its role is its path in quotes.

    A module that runs one parametric operation is a site of that operation; one that holds bare parameters is a
    site ``param`` for each of them (path of the parameter); further names of tied tensors give sites tied to the first.
    """
    made: dict[str, Site] = {}
    by_weight: dict[str, Site] = {}
    calls: dict[str, list[NodeRef]] = defaultdict(list)
    for projection in view.projections:
        path = view.path(projection.node, projection.weight)
        calls[path].append(projection.node.meta["origin"])
        if projection.whole and path not in made:
            made[path] = builder.part(f'"{path}"', whole(projection))
    for norm in view.norms:
        path = view.path(norm.out, norm.weight)
        if norm.weight and path not in made:
            made[path] = builder.norm(f'"{path}"', [norm])
        calls[path].append(norm.out.meta["origin"])
    for node in view.embeddings:
        weight = view.parameter_name(node.args[0])
        path = view.path(node, weight)
        if weight and path not in made:
            made[path] = builder.embedding(f'"{path}"', [node])
        calls[path].append(node.meta["origin"])
    covered: set[str] = set()
    for path, site in list(made.items()):
        made[path] = site = replace(site, calls=tuple(dict.fromkeys(calls[path])))
        covered |= {site.weight, site.bias}
        by_weight.setdefault(site.weight, site)
    constants = {str(n.target): n for n in view.nodes if n.op == "get_attr"}
    for name in names.parameters:
        if name in covered:
            continue
        node = constants.get(name)
        users: list[fx.Node] = view.users(node) if node is not None else []
        refs = tuple(dict.fromkeys(u.meta["origin"] for u in users if ops.name_of(u) not in ops.SIZES))
        made[name] = Site(
            f'"{name}"', "param", name, weight=name, shape=names.shapes[name], dtype=names.dtypes[name], calls=refs
        )  # fmt: skip
    order = {n: i for i, n in enumerate(names.parameters)}
    return tuple(sorted(made.values(), key=lambda s: (order.get(s.weight, len(order)), s.path)))
