"""A program's root graph with real tensors, to be run here and now (certificates, checks, export)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import fx, nn

from surgery.core.progress import Bytes, report
from surgery.model import masked
from surgery.model.lazygraph import compile_tree, copy_tree
from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.model.retarget import retarget
from surgery.model.weights import Expr


class Results(OrderedDict[str, tuple[torch.Tensor, ...]]):
    """Results of functions by the identity of their call, up to ``max_bytes``: what goes is computed again when it is needed."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.bytes = 0

    def __setitem__(self, key: str, value: tuple[torch.Tensor, ...]) -> None:
        super().__setitem__(key, value)
        self.bytes += _size(value)
        while self.bytes > self.max_bytes and len(self) > 1:
            _, old = self.popitem(last=False)
            self.bytes -= _size(old)


def _size(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Tensors:
    """Realised tensors by the identity of their expression, so that programs that share weights share memory.

    Up to ``max_bytes`` are kept, the least recently used goes first; a tensor handed out stays valid for its holder.
    """

    def __init__(self, functions: Callable[[str], Callable[..., Any]], max_bytes: int = 8 << 30) -> None:
        self.functions = functions
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._memo = Results(max_bytes // 4)
        self.measured: dict[str, torch.Tensor] = {}
        """Small results that several claims ask for, by what gives them."""

    def of(self, program: Program, name: str) -> torch.Tensor:
        """One tensor by its name or a tied name. Do not change it in place."""
        expr = program.weights[program.aliases.get(name, name)]
        key = expr.identity
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = realise(expr, self._memo, functions=self.functions)
        self._kept[key] = value
        self._bytes += value.numel() * value.element_size()
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()
        return value

    def fresh(self, program: Program, name: str, memo: MutableMapping[str, Any]) -> torch.Tensor:
        """One tensor that is not kept here once its holder drops it; ``memo`` shares results of functions between calls."""
        return self.value(program.weights[program.aliases.get(name, name)], memo)

    def value(self, expr: Expr, memo: MutableMapping[str, Any]) -> torch.Tensor:
        """As :meth:`fresh`, of an expression."""
        kept = self._kept.get(expr.identity)
        return kept if kept is not None else realise(expr, memo, functions=self.functions)

    def all(self, program: Program) -> dict[str, torch.Tensor]:
        """Every tensor by its first name, each a copy of its own: a module trains it in place, and what is kept here must not follow."""
        memo = Results(self.max_bytes // 4)
        return {name: self.fresh(program, name, memo).clone() for name in program.weights}


def live_root(program: Program, tensors: Tensors, *, dtype: torch.dtype | None = None, device: str = "cpu") -> fx.GraphModule:
    """An independent root graph whose parameters and buffers hold the program's values in ``dtype`` (None: the program's own).

    Called with the flat inputs of the program's signature, returns its flat outputs. Tied parameters are one object.
    """
    wanted = dtype or getattr(torch, program.info.dtype)
    root = copy_tree(program.graph)
    retarget(root, dtype=wanted, device=torch.device(device))
    compile_tree(root)
    made: dict[str, nn.Parameter] = {}
    done, total = 0, Bytes(sum(e.nbytes for e in program.weights.values()))
    for path, module in root.named_modules():
        prefix = path + "." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = program.aliases.get(prefix + leaf, prefix + leaf)
            if name not in made:
                value = _cast(tensors.of(program, name), wanted).to(device)
                done += program.weights[name].nbytes
                report("computing weights", done, total)
                made[name] = nn.Parameter(value, requires_grad=value.is_floating_point() and name not in program.frozen)
            module._parameters[leaf] = made[name]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                done += program.weights[prefix + leaf].nbytes if prefix + leaf in program.weights else 0
                report("computing weights", min(done, total), total)
                module._buffers[leaf] = _cast(tensors.of(program, prefix + leaf), wanted).to(device)
    masked.bind(root)
    return root


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
