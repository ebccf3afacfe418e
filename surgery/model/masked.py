"""Masked weights: a program's notion of entries that are zero and stay zero.

The mask of a weight ``layers.0.q.weight`` is the buffer ``layers.0.q.weight_mask.keep`` (bool, of the stored shape, true where an
entry stays) of a :class:`MaskModule` beside it. It is a tensor like any other: it has an expression, is copied with the program,
stored with an artifact and moved with the module. The weight itself is stored with its zeros, so that whatever reads it needs
no mask; the mask says which zeros are meant. It has three users: an adapter on the weight keeps its change off the zeros, a
fold puts it over the result, and training keeps the gradient and the weight at zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.model.modules import register_module
from surgery.model.program import Origin, Program
from surgery.model.weights import Expr, Init, Masked, Update, select

SUFFIX = "_mask"
MODULE_TAG = "surgery.mask"


class MaskModule(nn.Module):
    """Holds the mask of the parameter ``leaf`` of the module that it stands in.

    After :meth:`bind` the parameter's gradient is zero where the mask is false, which keeps the zeros under every optimizer that
    moves entries by their own gradients; after an optimizer step under a controller the weight is set to zero there once more,
    for those that mix entries.
    """

    keep: Tensor

    def __init__(self, leaf: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.leaf = leaf
        self.register_buffer("keep", torch.ones(tuple(shape), dtype=torch.bool))
        self._owner: tuple[nn.Module, ...] = ()
        self._bound: tuple[Any, ...] = ()

    def bind(self, owner: nn.Module) -> None:
        """Guard the parameter of ``owner``. Binding again after a copy or another load is fine."""
        parameter = owner._parameters.get(self.leaf)
        self._owner = (owner,)
        if parameter is None or (self._bound and self._bound[0] is parameter):
            return
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # a hook needs it; it stays when the parameter is frozen and opened again later
        parameter.register_hook(self._mask_gradient)
        parameter.requires_grad_(trains)
        self._bound = (parameter,)

    def _mask_gradient(self, gradient: Tensor) -> Tensor:
        return torch.where(self.keep, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bound = ()  # hooks do not travel with a copy

    @torch.no_grad()
    def enforce(self) -> None:
        """Set the parameter to zero where the mask is false."""
        if self._owner:
            parameter = self._owner[0]._parameters[self.leaf]
            assert parameter is not None
            parameter.masked_fill_(self.keep.logical_not(), 0)

    # ------------------------------------------------------------ training events (see ``surgery.train``)

    def surgery_events(self) -> tuple[Any, nn.Module]:
        return _Keeper(), self

    # ------------------------------------------------------------ stored form

    def module_config(self) -> dict[str, Any]:
        return {"leaf": self.leaf, "shape": list(self.keep.shape)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskModule:
        shape = config["shape"]
        if not isinstance(config["leaf"], str) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("a mask has the name and the shape of a parameter")
        return cls(config["leaf"], shape)

    def extra_repr(self) -> str:
        return f"of {self.leaf}, {list(self.keep.shape)}"


class _Keeper:
    """What a mask does during training."""

    def after_optimizer(self, module: MaskModule, step: int) -> None:
        module.enforce()


register_module(MODULE_TAG, MaskModule)


def mask_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module, MaskModule]]:
    """Path, owner and module of every mask below ``root``; one that stands in several places once for each."""
    for path, owner in root.named_modules():
        for name, child in owner._modules.items():
            if isinstance(child, MaskModule):
                yield f"{path}.{name}" if path else name, owner, child


def bind(root: nn.Module) -> None:
    """Guard every masked parameter of a module with real tensors."""
    for _, owner, module in mask_modules(root):
        module.bind(owner)


def enforce(root: nn.Module) -> None:
    """Set every masked entry of a module with real tensors to zero."""
    for _, owner, module in mask_modules(root):
        module.bind(owner)
        module.enforce()


def zeroed(root: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` by name with those of masked parameters of ``root`` set to zero where their masks (among the tensors, too) say so."""
    out = dict(tensors)
    for path, _, _ in mask_modules(root):
        weight, keep = path.removesuffix(SUFFIX), out.get(f"{path}.keep")
        if weight in out and keep is not None:
            out[weight] = out[weight].masked_fill(keep.logical_not(), 0)
    return out


# ---------------------------------------------------------------- masks of a program


def mask_name(weight: str) -> str:
    """The name of a weight's mask."""
    return f"{weight}{SUFFIX}.keep"


def first(program: Program, name: str) -> str:
    """The first name of a tensor that may have several."""
    return program.aliases.get(name, name)


def _names(program: Program, weight: str) -> list[str]:
    """All names of a weight, the one given and the first one in front."""
    head = first(program, weight)
    return list(dict.fromkeys((weight, head, *(k for k, v in program.aliases.items() if v == head))))


def key_of(program: Program, weight: str) -> str | None:
    """The first name of a weight's mask, whichever of its names the weight is called by; None for a weight without one."""
    keys = (first(program, mask_name(name)) for name in _names(program, weight))
    return next((key for key in keys if key in program.weights), None)


def mask_of(program: Program, weight: str) -> Expr | None:
    """The expression of a weight's mask, None for a weight without one."""
    key = key_of(program, weight)
    return None if key is None else program.weights[key]


def masks(program: Program) -> dict[str, str]:
    """Masked weights by their first names, each with the first name of its mask, in the order of the model."""
    found: dict[str, str] = {}
    for path, _, _ in mask_modules(program.graph):
        found.setdefault(first(program, path.removesuffix(SUFFIX)), first(program, f"{path}.keep"))
    return {w: m for w, m in found.items() if w in program.weights}


def set_mask(program: Program, names: Sequence[str], keep: Expr, origin: Origin, source: Expr | None = None) -> None:
    """Give the weight that ``names`` share the mask ``keep``; ``source`` replaces its values (under the mask)."""
    weight = first(program, names[0])
    known = program.weights[weight]
    program.weights[weight] = Masked(known.shape, known.dtype, known if source is None else source, keep)
    _own(program, names, key_of(program, weight) or mask_name(names[0]), keep)
    program.journal.record(mask_name(names[0]), origin)


def _own(program: Program, names: Sequence[str], key: str, keep: Expr) -> None:
    """Puts one mask beside every one of ``names``: a module each, one buffer, one expression under ``key``."""
    program.weights[key] = keep
    shared = torch.empty(keep.shape, dtype=torch.bool, device="meta")
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder = program.module(owner)
        module = holder._modules.get(leaf + SUFFIX)
        if not isinstance(module, MaskModule):
            with torch.device("meta"):
                module = MaskModule(leaf, keep.shape)
            holder.add_module(leaf + SUFFIX, module)
        module.keep = shared
        if mask_name(name) != key:
            program.aliases[mask_name(name)] = key


def in_order(program: Program) -> None:
    """Expressions of masks stand right behind those of their weights, so that the two are computed together when weights are streamed."""
    behind = masks(program)
    moved = {mask: program.weights[mask] for mask in behind.values()}
    items = list(program.weights.items())
    program.weights.clear()
    for name, expr in items:
        if name not in moved:
            program.weights[name] = expr
        if name in behind:
            program.weights[behind[name]] = moved[behind[name]]


def split(program: Program, *groups: Sequence[str]) -> None:
    """After a weight was untied into groups of names: each group that has masks gets a mask of its own, equal to the old one."""
    owned = {n: m for g in groups for n in g if (m := _module(program, n)) is not None}
    if not owned:
        return
    keys = {first(program, mask_name(n)) for n in owned}
    keep = next(program.weights[k] for k in sorted(keys) if k in program.weights)
    for name in owned:
        program.aliases.pop(mask_name(name), None)
        program.weights.pop(mask_name(name), None)
    for group in groups:
        members = [n for n in group if n in owned]
        if members:
            _own(program, members, mask_name(members[0]), keep)
    in_order(program)


def _module(program: Program, weight: str) -> MaskModule | None:
    owner, _, leaf = weight.rpartition(".")
    try:
        found = program.module(owner)._modules.get(leaf + SUFFIX)
    except AttributeError:  # a name that only ties others (the `shared` of an encoder-decoder) may have no module
        return None
    return found if isinstance(found, MaskModule) else None


def keep_mask(program: Program, weight: str) -> bool:
    """Put the mask over a weight whose expression was just replaced; False for a weight without a mask."""
    keep = mask_of(program, weight)
    if keep is None:
        return False
    name = first(program, weight)
    expr = program.weights[name]
    program.weights[name] = Masked(expr.shape, expr.dtype, expr, keep)
    return True


def reshape_mask(program: Program, weight: str, change: Callable[[Expr], Expr]) -> bool:
    """Change a weight's mask as the weight itself was changed (``change`` maps its expression); False where there is none."""
    key = key_of(program, weight)
    if key is None:
        return False
    new = program.weights[key] = change(program.weights[key])
    empty = torch.empty(new.shape, dtype=torch.bool, device="meta")
    for name in _names(program, weight):
        module = _module(program, name)
        if module is not None:
            module.keep = empty
    return True


def cut_mask(program: Program, weight: str, axis: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    """Restrict a weight's mask to half-open ``ranges`` on one axis, as a cut restricts the weight; False where there is none."""
    return reshape_mask(program, weight, lambda keep: select(keep, axis, ranges))


def spread(keep: Expr, whole: Expr | None, shape: tuple[int, ...], axis: int, rows: tuple[tuple[int, int], ...]) -> Expr:
    """The mask ``keep`` of some ``rows`` of a weight as a mask of the whole weight; the rest as in ``whole`` (None: all stays)."""
    if not rows:
        return keep
    base = whole or Init(shape, "bool", "ones")
    return Update(shape, "bool", base, keep, axis, rows)


def zeros(program: Program, read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
    """For each masked weight how many entries its mask holds at zero, and how many of those are not zero: none, if all is well.

    ``read`` realises a tensor by name; one weight is in memory at a time.
    """
    found = {}
    for weight, mask in masks(program).items():
        gone = read(mask).logical_not()
        found[weight] = int(gone.sum()), int((read(weight)[gone] != 0).sum())
    return found


def certificate(before: Program, after: Program, read: Callable[[Program, str], Tensor]) -> dict[str, Any] | None:
    """That a fold kept the zeros of every masked weight, counted entry by entry; None for a program without masks.

    The error is the number of entries that are not zero as they should be, of weights that lost their mask all that it held.
    """
    old = zeros(before, lambda name: read(before, name))
    if not old:
        return None
    new = zeros(after, lambda name: read(after, name))
    held, wrong = sum(n for n, _ in old.values()), sum(bad for _, bad in new.values())
    found = sum(n for n, _ in new.values()) - wrong
    wrong += sum(n for name, (n, _) in old.items() if key_of(after, name) is None)
    return {
        "claim": f"masks kept: {held:,} zeros before the fold, {found:,} after", "max_abs_error": float(wrong), "tolerance": 0.0,
        "ok": not wrong and found >= held, "samples": [], "zeros_before": held, "zeros_after": found,
    }  # fmt: skip
