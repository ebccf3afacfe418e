"""What a rotation of the residual stream has to know: its positions, the norms that read it, who writes and who reads it.

Found on the flat graph of a model without attachments. Everything that does not fit is refused with the place that does not:
a rotation is only right when every reader and writer is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.core.site import NodeRef, Site
from surgery.model.anatomy import ops
from surgery.model.program import Program

PASSES = frozenset(
    {
        "reshape", "view", "_unsafe_view", "contiguous", "clone", "dropout", "native_dropout", "to", "_to_copy", "detach", "select", "slice",
        "unsqueeze", "squeeze", "expand",
    }
)  # fmt: skip
"""Operations that leave the last axis as it is (where its size says so)."""

RESHAPES = frozenset({"reshape", "view", "_unsafe_view", "contiguous", "clone", "unsqueeze", "squeeze"})
"""Those among them that keep every row of the stream."""


class Misfit(Exception):
    """Why a model cannot be rotated; the message stands alone."""


@dataclass(frozen=True)
class Norm:
    """A norm that reads the stream: ``out`` is the flat node of its result, ``gain`` and ``shift`` names of parameters ("" for none)."""

    site: Site
    kind: str
    source: fx.Node
    out: fx.Node
    gain: str
    shift: str
    eps: float


@dataclass(frozen=True)
class Linear:
    """A weight with features of the stream on ``axis`` and, for readers, the name of the bias that is added ("" for none)."""

    weight: str
    axis: int
    bias: str = ""
    module: str = ""
    """Path of the ``nn.Linear`` that holds it, where it is one."""


@dataclass
class Position:
    """One place of the stream: its value, the norm behind it, what reads the normed value and what wrote the value's last summand.

    ``restored``: the normed value also leaves the model as an output.
    """

    value: fx.Node
    ref: NodeRef
    norm: Norm
    readers: list[Linear]
    restored: bool
    writers: list[Linear]
    add: fx.Node | None = None
    """The addition that makes this value of the one before and the writers' output (None for the first)."""


@dataclass
class Stream:
    """The whole stream of a model, in order."""

    width: int
    positions: list[Position] = field(default_factory=list)

    @property
    def centred(self) -> bool:
        """Norms take the mean away."""
        return self.positions[0].norm.kind == "layer"


def find_stream(program: Program) -> Stream:
    """The stream of a pre-norm model with one stack of layers. Raises :class:`Misfit`."""
    stacks = [s for s in program.anatomy.stacks if s.layers]
    if len(stacks) != 1:
        raise Misfit(f"it has {len(stacks)} stacks of layers, and one stream goes through one stack")
    graph = program.dims.graph
    by_ref = {ref: node for node in graph.nodes if node.op != "output" for ref in node.meta["refs"]}
    order = {node: i for i, node in enumerate(graph.nodes)}
    parts = [s for s in program.anatomy.sites if s.is_region and s.residual is not None and s.layer is not None and s.output is not None]
    if not parts:
        raise Misfit("its layers have no residual additions")
    for part in parts:
        if part.norm_output is not None:
            raise Misfit(
                f"{part.role} is followed by a norm (post-norm): the stream itself is normed, and no rotation passes a norm's gain"
            )
        if part.facts.get("calls", 1) != 1:
            raise Misfit(f"{part.role} is used several times")
    norms = _norms(program, by_ref)
    parts.sort(key=lambda s: order[by_ref[s.output]])  # type: ignore[index]
    width = _size(by_ref[parts[0].residual])  # type: ignore[index]
    stream = Stream(width)
    writers: list[Linear] = []
    value, add = by_ref[parts[0].residual], None  # type: ignore[index]
    for part in parts:
        assert part.residual is not None and part.output is not None and part.input is not None
        here, out = by_ref[part.residual], by_ref[part.output]
        if not _reshaped(value, here, width):
            raise Misfit(f"{part.role} does not follow the part in front of it in one chain (parallel branches)")
        stream.positions.append(_position(here, part.residual, norms, by_ref.get(part.input), writers, add, part.role, width))
        add = next((u for u in out.users if ops.name_of(u) == "add" and set(u.all_input_nodes) == {here, out} and len(u.args) == 2), None)
        if add is None or len(out.users) != 1:
            raise Misfit(f"the output of {part.role} is not simply added to the stream")
        writers = [_writer(out, part.role, width)]
        value = add
    value = _end(value, width)
    last = NodeRef(*value.meta["origin"])
    stream.positions.append(_position(value, last, norms, None, writers, add, "the stack", width))
    stream.positions[0].writers = _starts(stream.positions[0].value, width)
    kinds = {p.norm.kind for p in stream.positions}
    if len(kinds) > 1:
        raise Misfit("its norms are of different kinds")
    return stream


def _reshaped(value: fx.Node, here: fx.Node, width: int) -> bool:
    """Whether ``here`` is ``value``, or ``value`` with its rows laid out in another way (OPT flattens them in front of its
    feed-forward block) that nothing else reads in between."""
    while here is not value:
        source = here.args[0] if here.args else None
        if ops.name_of(here) not in RESHAPES or not isinstance(source, fx.Node) or _size(source) != width or _size(here) != width:
            return False
        if any(u is not here and ops.name_of(u) != "sym_size" for u in source.users):
            return False
        here = source
    return True


def _end(value: fx.Node, width: int) -> fx.Node:
    """The last value of the stream with its rows laid out as the norm behind it reads them."""
    while True:
        readers = [u for u in value.users if ops.name_of(u) != "sym_size"]
        if len(readers) != 1 or not _reshaped(value, readers[0], width):
            return value
        value = readers[0]


def _position(
    value: fx.Node, ref: NodeRef, norms: list[Norm], out: fx.Node | None, writers: list[Linear], add: fx.Node | None, where: str, width: int
) -> Position:
    mine = [n for n in norms if n.source is value]
    if len(mine) != 1 or (out is not None and mine[0].out is not out):
        raise Misfit(f"the stream at {where} does not go through one norm (it is not a pre-norm model, or its norm has an unknown form)")
    norm = mine[0]
    known = _inside(norm)
    for user in value.users:
        if user not in known and user is not norm.out and ops.name_of(user) not in ("add", "sym_size"):
            raise Misfit(f"`{user.name}` reads the stream at {where} without a norm")
    if sum(ops.name_of(u) == "add" for u in value.users) > 1 or any(u.op == "output" for u in value.users):
        raise Misfit(f"the stream at {where} is read without a norm")
    readers, restored = _readers(norm.out, where, width)
    if not readers and not restored:
        raise Misfit(f"nothing reads the norm at {where}")
    return Position(value, ref, norm, readers, restored, writers, add)


def _inside(norm: Norm) -> set[fx.Node]:
    """The nodes between a norm's input and its result."""
    found: set[fx.Node] = set()
    stack = list(norm.out.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in found or node is norm.source or node.op == "get_attr":
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


# ---------------------------------------------------------------- norms


def _norms(program: Program, by_ref: dict[NodeRef, fx.Node]) -> list[Norm]:
    found = []
    for site in program.anatomy.sites:
        if site.op == "norm" and len(site.calls) == 1 and site.calls[0] in by_ref:
            norm = _norm(site, by_ref[site.calls[0]])
            if norm is not None:
                found.append(norm)
    return found


def _norm(site: Site, out: fx.Node) -> Norm | None:
    name = ops.name_of(out)
    if name == "layer_norm":
        x, shape, weight, bias, eps = (*out.args, *(None, None, 1e-5)[len(out.args) - 2 :])[:5]
        return Norm(site, "layer", x, out, _named(weight), _named(bias), float(eps)) if len(shape) == 1 else None  # type: ignore[arg-type]
    if name == "rms_norm":
        x, shape, weight, eps = (*out.args, *(None, None)[len(out.args) - 2 :])[:4]
        value = torch.finfo(torch.float32).eps if eps is None else float(eps)  # type: ignore[arg-type]
        return Norm(site, "rms", x, out, _named(weight), "", value) if len(shape) == 1 else None  # type: ignore[arg-type]
    if name != "mul":
        return None
    gains = [a for a in out.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    rest = [a for a in out.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    if len(gains) != 1 or len(rest) != 1:
        return None
    scaled = _plain(rest[0])
    if ops.name_of(scaled) != "mul":
        return None
    for x, root in (scaled.args[:2], scaled.args[1::-1]):
        if isinstance(root, fx.Node) and ops.name_of(root) == "rsqrt" and isinstance(x, fx.Node):
            eps = _epsilon(root, x)
            if eps is not None:
                return Norm(site, "rms", _plain(x), out, str(gains[0].target), "", eps)
    return None


def _epsilon(root: fx.Node, x: fx.Node) -> float | None:
    """The constant in ``rsqrt(mean(x^2) + eps)``; None for another form."""
    add = root.args[0]
    if not isinstance(add, fx.Node) or ops.name_of(add) != "add" or not isinstance(add.args[1], float | int):
        return None
    mean = add.args[0]
    if not isinstance(mean, fx.Node) or ops.name_of(mean) != "mean":
        return None
    power = mean.args[0]
    if not isinstance(power, fx.Node) or ops.name_of(power) != "pow" or power.args[0] is not x or power.args[1] != 2:
        return None
    return float(add.args[1])


def _plain(node: fx.Node) -> fx.Node:
    """Behind changes of the number type."""
    while ops.name_of(node) in ("to", "_to_copy") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _named(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) else ""


def _size(node: fx.Node) -> int:
    shape = getattr(node.meta.get("spec"), "shape", ())
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else -1


# ---------------------------------------------------------------- readers and writers


def _readers(out: fx.Node, where: str, width: int) -> tuple[list[Linear], bool]:
    """The linear maps that read a normed value, and whether it leaves the model."""
    found: list[Linear] = []
    restored = False
    stack = [out]
    while stack:
        value = stack.pop()
        for user in value.users:
            name = ops.name_of(user)
            if user.op == "output":
                if value is not out:
                    raise Misfit(f"the normed stream at {where} leaves the model in another form")
                restored = True
            elif name == "sym_size":
                continue
            elif name in PASSES and _size(user) == width:
                stack.append(user)
            else:
                linear = _linear(user, value)
                if linear is None or linear.weight in {f.weight for f in found}:
                    raise Misfit(f"`{user.name}` reads the normed stream at {where}, and is no linear map with a weight of its own")
                found.append(linear)
    return found, restored


def _linear(node: fx.Node, x: fx.Node | None, reads: bool = True) -> Linear | None:
    """A product of ``x`` with a stored matrix: the matrix, the axis on which the stream stands, and its bias."""
    name, args = ops.name_of(node), node.args
    if name == "linear" and (x is None or args[0] is x):
        weight, bias, axis = args[1], args[2] if len(args) > 2 else None, 1
    elif name == "addmm" and (x is None or args[1] is x):
        weight, bias, axis = args[2], args[0], 0
    else:
        return None
    if (
        not isinstance(weight, fx.Node)
        or weight.op != "get_attr"
        or (bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"))
    ):
        return None
    return Linear(str(weight.target), axis if reads else 1 - axis, _named(bias), node.meta.get("path", "") or "")


def _writer(out: fx.Node, where: str, width: int) -> Linear:
    node = out
    while ops.name_of(node) in PASSES and isinstance(node.args[0], fx.Node) and _size(node.args[0]) == width:
        node = node.args[0]
    found = _linear(node, None, reads=False)
    if found is None or len(node.users) != 1:
        raise Misfit(f"the output of {where} is made by `{node.name}`, which is no linear map with a weight of its own")
    return found


def _starts(value: fx.Node, width: int) -> list[Linear]:
    """The tables, parameters and maps whose sum is the first value of the stream."""
    found: list[Linear] = []
    stack: list[fx.Node] = [value]
    while stack:
        node = stack.pop()
        name = ops.name_of(node)
        if node.op == "get_attr":
            rank = len(node.meta["spec"].shape)
            found.append(Linear(str(node.target), rank - 1))
        elif name == "embedding":
            found.append(Linear(_named(node.args[0]), 1))
        elif name == "add" and all(isinstance(a, fx.Node) for a in node.args[:2]) and not node.kwargs:
            stack += [a for a in node.args[:2] if isinstance(a, fx.Node)]
        elif name == "mul" and sum(isinstance(a, fx.Node) for a in node.args[:2]) == 1 and not isinstance(node.args[0], float | int):
            stack.append(node.args[0])  # type: ignore[arg-type]
        elif name == "cat" and (len(node.args) > 1 and node.args[1] not in (-1, len(node.meta["spec"].shape) - 1)):
            stack += list(node.args[0])  # type: ignore[arg-type]
        elif name in PASSES and isinstance(node.args[0], fx.Node) and _size(node.args[0]) == width:
            stack.append(node.args[0])
        elif (conv := _patches(node)) is not None:
            found.append(conv)
        elif (linear := _linear(node, None, reads=False)) is not None:
            found.append(linear)
        else:
            raise Misfit(f"the stream starts with `{node.name}`, which is no sum of tables, parameters and linear maps")
    names = [f.weight for f in found]
    if len(set(names)) != len(names) or not all(names):
        raise Misfit("a table enters the stream twice")
    return found


def _patches(node: fx.Node) -> Linear | None:
    """A convolution whose places become tokens: ``transpose(flatten(conv(x), 2), 1, 2)``."""
    if ops.name_of(node) != "transpose" or sorted(a % 3 for a in node.args[1:3] if isinstance(a, int)) != [1, 2]:
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or ops.name_of(inner) not in ("flatten", "reshape", "view"):
        return None
    conv = inner.args[0]
    if not isinstance(conv, fx.Node) or not ops.name_of(conv).startswith("conv"):
        return None
    weight, bias = conv.args[1], conv.args[2]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return Linear(str(weight.target), 0, _named(bias))
