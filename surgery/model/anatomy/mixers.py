"""Mixers: sublayers of the residual stream that are neither attention nor feed-forward, such as a state-space recurrence, a linear attention
or a gated convolution (Mamba-2, Qwen3-Next, LFM2, RWKV).

They are found by their place alone: a projection that joins the stream, everything between it and the stream, and among that the projections
that read what enters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.sources import Sources
from surgery.model.anatomy.streams import Exit, Streams


@dataclass(eq=False)
class Mixer:
    """``ins`` read the block's input, ``inner`` are further products between, ``out`` gives what joins the stream; ``tables`` are parameters
    that no projection, norm or convolution has."""

    ins: list[Projection]
    inner: list[Projection]
    out: Projection
    input: fx.Node
    exit: Exit
    norms: list[Norm] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)

    @property
    def projections(self) -> list[Projection]:
        return [*self.ins, *self.inner, self.out]


class Mixers(Streams):
    """The mixers of one graph, in order of execution, as ``found``. ``taken`` are the projections of other blocks, ``joined`` the additions at
    which those join the stream."""

    def __init__(self, view: GraphView, sources: Sources, taken: set[Projection], joined: set[fx.Node]) -> None:
        super().__init__(view, sources)
        self._taken = set(taken)
        self._joined = set(joined)
        self.found: list[Mixer] = []
        for out in view.projections:
            if out in self._taken or out.kind not in ("linear", "conv1d"):
                continue
            mixer = self._trace(out)
            if mixer is not None:
                self.found.append(mixer)
                self._taken |= set(mixer.projections)
                self._joined.add(mixer.exit.add)

    def _trace(self, out: Projection) -> Mixer | None:
        """What stands between a projection and the stream that its output joins; None where that is no closed block."""
        joined = self.exit(out.node, out.x)
        if joined is None or joined.add in self._joined:
            return None
        stream = self.view.strip(joined.residual)
        inside: list[Projection] = []
        norms: list[Norm] = []
        tables: list[fx.Node] = []
        for node in self.view.backward(out.x, lambda n: n is stream or n in self._joined):
            if node is stream:
                continue
            if node in self._joined or ops.name_of(node) == "embedding" or (node.op == "placeholder" and ops.is_activation(node)):
                return None  # reads something besides the stream
            projection = self.view.by_node.get(node)
            if projection is not None:
                if projection in self._taken:
                    return None
                inside.append(projection)
            norm = self.view.norm_of.get(node)
            if norm is not None:
                norms.append(norm)
            if node.op == "get_attr":
                tables.append(node)
        inside.sort(key=lambda p: p.order)
        products = [p for p in inside if p.kind != "conv"]
        ins = [p for p in products if self._enters(p.x, stream)]
        if not ins:
            return None
        entering = [n.out for n in norms if self.view.strip(n.x) is stream]
        source = entering[0] if len(entering) == 1 else self.view.strip(ins[0].x, dropout=False)
        own = {n for p in [*inside, out] for n in (p.weight, p.bias)} | {n for norm in norms for n in (norm.weight, norm.bias)}
        return Mixer(
            ins, [p for p in products if p not in ins], out, source, joined,
            [n for n in norms if self.view.strip(n.x) is not stream],
            sorted((t for t in tables if str(t.target) not in own and t.meta.get("parameter")), key=self.view.position.__getitem__),
        )  # fmt: skip

    def _enters(self, node: fx.Node, stream: fx.Node) -> bool:
        """Whether a value is the stream up to norms, views and elementwise operations (masks, mixes with the token before)."""
        return not any(n in self.view.by_node for n in self.view.backward(node, lambda n: n is stream or n in self.view.by_node))
