"""Operations that stand only in a raw trace: region boundaries, stubs of twin layers, inputs alike, stochastic depth.

They are ordinary library operations, so ``torch.export`` records them without looking inside; the normal form of a capture
has none of them left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("surgery_capture", "DEF")  # keeps the registrations alive
_LIBRARY.define("enter(Tensor[] xs, int region) -> Tensor[]")
_LIBRARY.define("exit(Tensor[] ys, int region) -> Tensor[]")
_LIBRARY.define("stub(Tensor[] xs, int region) -> Tensor[]")
_LIBRARY.define("likes(Tensor x, int count) -> Tensor[]")
_LIBRARY.define("drop_path(Tensor x, str path) -> Tensor")

enter = torch.ops.surgery_capture.enter
exit_ = torch.ops.surgery_capture.exit
stub = torch.ops.surgery_capture.stub
likes = torch.ops.surgery_capture.likes
drop_path = torch.ops.surgery_capture.drop_path

ENTER = torch.ops.surgery_capture.enter.default
EXIT = torch.ops.surgery_capture.exit.default
STUB = torch.ops.surgery_capture.stub.default
LIKES = torch.ops.surgery_capture.likes.default
DROP_PATH = torch.ops.surgery_capture.drop_path.default


@dataclass
class Like:
    """Sizes, strides and dtype of a tensor that a stub must invent."""

    size: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    first: Tensor | None = None

    @staticmethod
    def of(tensor: Tensor) -> Like:
        return Like(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def another(self) -> Tensor:
        """One more of these: the tracer needs much less time for a view of the first than for a tensor with sizes of its own."""
        self.first = self.make() if self.first is None else self.first
        return self.first.detach()


# What the stub of each region returns; filled by the tracer while an export runs.
stub_outputs: dict[int, list[Like]] = {}


def _fresh(xs: list[Tensor], region: int) -> list[Tensor]:
    return [Like.of(x).make() for x in xs]


def _copy(xs: list[Tensor], region: int) -> list[Tensor]:
    return [x.clone() for x in xs]


def _stub_fake(xs: list[Tensor], region: int) -> list[Tensor]:
    return [like.another() for like in stub_outputs[region]]


def _likes_fake(x: Tensor, count: int) -> list[Tensor]:
    first = Like.of(x)
    return [first.another() for _ in range(count)]


def _never(xs: list[Tensor], region: int) -> list[Tensor]:
    raise RuntimeError("a stub of a capture has no body")


for _name, _fake, _real in (("enter", _fresh, _copy), ("exit", _fresh, _copy), ("stub", _stub_fake, _never)):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"surgery_capture::{_name}", _fake, lib=_LIBRARY)

_LIBRARY.impl("likes", lambda x, count: [torch.empty_like(x) for _ in range(count)], "CompositeExplicitAutograd")
torch.library.register_fake("surgery_capture::likes", _likes_fake, lib=_LIBRARY)
_LIBRARY.impl("drop_path", lambda x, path: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("surgery_capture::drop_path", lambda x, path: torch.empty_like(x), lib=_LIBRARY)
