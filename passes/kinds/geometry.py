"""The shape of a parametric site, as plain data that a method's mathematics and a saved module both use.

Mathematics is written once, in *canonical* form: a weight is ``[out, in]`` (``[experts, out, in]`` for expert tensors, a
convolution's kernel flattened to ``[out, in / groups * k1 * k2]``), whatever way the model stores it. This module holds the
way there and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span


@dataclass(frozen=True)
class Geometry:
    """What kind of linear map a site is.

    ``op`` is ``linear`` (also a transposed ``conv1d``), ``conv``, ``embedding`` or ``experts``. ``out`` and ``inp`` are the
    logical features of the site (for a convolution channels, for an embedding the width and the number of rows).
    ``full_out`` is the size of the stored out axis and ``rows`` the half-open ranges on it that are the site (empty: all).
    ``experts`` is the leading size of the site's part of an expert tensor or 0; ``member`` is the place of a site that is one expert of it (then
    ``experts`` is 1), else negative. ``transposed`` weights are stored ``[in, out]``.
    """

    op: str
    out: int
    inp: int
    full_out: int
    rows: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_idx: int | None = None
    member: int = -1

    @property
    def fan_in(self) -> int:
        """Length of one canonical row: the number of inputs that one output sums over."""
        return self.inp // self.groups * math.prod(self.kernel)

    @property
    def max_rank(self) -> int:
        """The largest rank a canonical weight (of one expert or group) can have, all groups together."""
        return min(self.out // self.groups, self.fan_in) * self.groups

    @property
    def canonical(self) -> tuple[int, ...]:
        """Shape of the canonical weight of this site."""
        return (self.experts, self.out, self.inp) if self.experts else (self.out, self.fan_in)

    @property
    def is_slice(self) -> bool:
        return bool(self.rows)

    def pairs(self) -> tuple[tuple[str, Any], ...]:
        """As hashable, JSON-able pairs; the default values are left out."""
        plain = Geometry(self.op, self.out, self.inp, self.full_out)
        return tuple((k, v) for k, v in vars(self).items() if k in ("op", "out", "inp", "full_out") or v != getattr(plain, k))

    def as_json(self) -> dict[str, Any]:
        return {k: _plain(v) for k, v in asdict(self).items() if k != "member" or v >= 0}

    @classmethod
    def of(cls, data: Any) -> Geometry:
        """From :meth:`as_json` or :meth:`pairs`."""
        return cls(**{k: _tuples(v) for k, v in dict(data).items()})

    # -------------------------------------------------------------- weights

    def to_canonical(self, stored: Tensor) -> Tensor:
        """The site's part of a stored weight (already restricted to ``rows``) in canonical form; a view where possible."""
        if self.op == "conv":
            return stored.reshape(self.out, -1)
        return stored.transpose(-1, -2) if self.transposed else stored

    def from_canonical(self, weight: Tensor) -> Tensor:
        if self.op == "conv":
            return weight.reshape(-1, self.inp // self.groups, *self.kernel)
        return weight.transpose(-1, -2) if self.transposed else weight

    def select(self, stored: Tensor) -> Tensor:
        """The site's part of the whole stored weight (a view when there is one range of rows)."""
        return take(self.own(stored), self.rows, self.out_axis)

    def own(self, stored: Tensor) -> Tensor:
        """All rows of the experts that are the site: one of them, or the whole tensor."""
        return stored if self.member < 0 else stored.narrow(0, self.member, 1)

    def put(self, stored: Tensor, own: Tensor) -> Tensor:
        """The whole stored weight with ``own`` in the place of :meth:`own`; the bits of other experts stay."""
        if self.member < 0:
            return own
        parts = (stored[: self.member], own, stored[self.member + 1 :])
        return torch.cat([p for p in parts if p.shape[0]])

    @property
    def out_axis(self) -> int:
        """The out axis of the stored weight."""
        return (1 if self.experts else 0) + (1 if self.transposed else 0)

    def spread(self, part: Tensor, fill: float = 0.0, axis: int = 0) -> Tensor:
        """``part`` (length ``out`` on ``axis``) put at the site's rows of a tensor of length ``full_out``, else ``fill``.

        The adapters of a slice of a fused projection grow their small factor this way, so that one product adds into
        the whole output and no full-size activation is cut and joined.
        """
        if not self.rows:
            return part
        axis %= part.dim()
        if len(self.rows) == 1:
            lo, hi = self.rows[0]
            pad = [0, 0] * (part.dim() - 1 - axis) + [lo, self.full_out - hi]
            return F.pad(part, pad, value=fill)
        order = sorted(range(len(self.rows)), key=lambda i: self.rows[i])
        chunks = part.split([hi - lo for lo, hi in self.rows], dim=axis)
        pieces, at = [], 0
        for i in [*order, -1]:
            lo, hi = self.rows[i] if i >= 0 else (self.full_out, self.full_out)
            if lo > at:
                shape = list(part.shape)
                shape[axis] = lo - at
                pieces.append(part.new_full(shape, fill))
            if i >= 0:
                pieces.append(chunks[i])
            at = hi
        return torch.cat(pieces, dim=axis)

    # -------------------------------------------------------------- application

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The site's linear map without bias, for a canonical weight of this site; slices give only their ``out`` features."""
        if self.op == "embedding":
            return F.embedding(x, weight.t(), padding_idx=self.padding_idx)
        if self.op == "conv":
            return self.convolve(x, self.from_canonical(weight))
        return F.linear(x, weight)

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        run = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        padding: Any = self.padding if isinstance(self.padding, str) else list(self.padding)
        return run(x, kernel, None, list(self.stride), padding, list(self.dilation), self.groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A 1x1 convolution in the site's groups; ``weight [out, in / groups]`` or with ones behind."""
        run = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return run(x, weight.reshape(weight.shape[0], -1, *(1,) * len(self.kernel)), groups=self.groups)


def take(tensor: Tensor, ranges: Sequence[tuple[int, int]], axis: int) -> Tensor:
    """The half-open ``ranges`` of ``tensor`` on ``axis``, in order; everything when there are none."""
    if not ranges:
        return tensor
    parts = [tensor.narrow(axis, lo, hi - lo) for lo, hi in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def geometry_of(site: Site, stored: tuple[int, ...], config: dict[str, Any], span: Span = NOWHERE) -> Geometry:
    """The geometry of ``site`` whose whole stored weight has shape ``stored``.

    ``config`` holds what only the call knows: ``stride``, ``padding``, ``dilation``, ``groups`` of a convolution,
    ``padding_idx`` of an embedding. Raises S0270 for a site that has no weight matrix.
    """
    if site.op == "embedding":
        return Geometry("embedding", stored[1], stored[0], stored[1], transposed=True, padding_idx=config.get("padding_idx"))
    if site.op not in ("linear", "conv1d", "conv", "experts", "expert") or not site.weight:
        raise fail(
            "S0270", f"{site.role} is a {site.op}: it has no weight matrix to adapt", span, "selected here",
            help="select linear, convolution, embedding or expert sites, for example `layers[*].attn.{q, v}`",
        )  # fmt: skip
    rows = tuple(tuple(r) for r in site.rows)
    full = stored[site.out_axis]
    out = sum(hi - lo for lo, hi in site.rows) if rows else full
    if site.op == "conv":
        groups = int(config.get("groups", 1))
        spatial = len(stored) - 2
        padding = config.get("padding", 0)
        return Geometry(
            "conv", out, stored[1] * groups, full, kernel=tuple(stored[2:]), groups=groups,
            stride=_each(config.get("stride", 1), spatial), dilation=_each(config.get("dilation", 1), spatial),
            padding=padding if isinstance(padding, str) else _each(padding, spatial),
        )  # fmt: skip
    inp = stored[site.in_axis]
    transposed = site.out_axis > site.in_axis
    if site.op == "expert":
        return Geometry("experts", out, inp, full, rows, 1, transposed, member=int(str(site.facts["expert"])))  # type: ignore[arg-type]
    experts = stored[0] if site.op == "experts" else 0
    return Geometry("experts" if experts else "linear", out, inp, full, rows, experts, transposed)  # type: ignore[arg-type]


def whole(geometry: Geometry) -> Geometry:
    """The geometry of the stored parameter that a slice belongs to."""
    return replace(geometry, rows=(), out=geometry.full_out)


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
    return values * n if len(values) == 1 else values


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
