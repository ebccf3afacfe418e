"""What gradients are taken of: the model's own loss where there is one, else how strongly the outputs react."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surgery.model import losses, pytree
from surgery.model.data import Batch
from surgery.model.program import Program
from surgery.model.runtime_call import Call


class Objective:
    """The loss of each sample of a batch, from the flat outputs.

    With labels (given, or those of a causal model's own text) it is the model's own loss of that sample alone. Without, it is the
    *output sensitivity*

        L_i = sum_o <y_o, r_o> / sqrt(n_o)

    over the floating outputs ``y_o`` that are no cache and compare no samples with each other: ``r_o`` holds signs drawn uniformly, from ``seed`` and the number of the
    sample alone, and ``n_o`` counts the real tokens (rows) of the sample. The mean of the squared gradient of ``<y, r>`` over signs
    is the squared norm of the outputs' Jacobian (Hutchinson's estimate), so what moves the outputs has large gradients.
    """

    def __init__(self, program: Program, seed: int = 0) -> None:
        self.program, self.seed = program, seed
        self.call = Call(program.signature, program.graph.graph)
        self.task = losses.task_of(program.info.architecture)
        self.config = SimpleNamespace(**program.info.config)
        output = next(n for n in reversed(program.graph.graph.nodes) if n.op == "output")
        leaves = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
        self.specs = [getattr(leaf, "meta", {}).get("spec") for leaf in leaves]
        self.cached = list(_cache_leaves(program.signature.out_spec))

    def own(self, labels: Mapping[str, Any]) -> bool:
        """Whether the model's own loss is used for these labels."""
        return self.task is not None and all(labels.get(n) is not None for n in self.task.required) and bool(self.task.required)

    def losses(self, leaves: Sequence[Any], batch: Batch) -> list[Tensor]:
        """One number for each sample; fewer when a sample has nothing to predict."""
        if self.own(batch.labels):
            return self._own(leaves, batch)
        return [self._sensitivity(leaves, batch, row) for row in range(batch.rows)]

    def _own(self, leaves: Sequence[Any], batch: Batch) -> list[Tensor]:
        assert self.task is not None
        out = self.call.result(leaves)
        named = {k: v for k, v in out.items() if isinstance(v, Tensor)}
        found = []
        for row in range(batch.rows):
            labels = {k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.labels.items()}
            if not _predicts(labels.get("labels"), self.program.info.architecture):
                continue
            one = {k: v[row : row + 1] if v.ndim and v.shape[0] == batch.rows else v for k, v in named.items()}
            loss = losses.compute(self.task, one, labels, self.config)
            if loss is not None:
                found.append(loss)
        return found

    def _sensitivity(self, leaves: Sequence[Any], batch: Batch, row: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + batch.first + row) % (1 << 63))
        total = torch.zeros(())
        for leaf, spec, cached in zip(leaves, self.specs, self.cached, strict=True):
            if cached or not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim == 0 or leaf.shape[0] != batch.rows:
                continue
            if _crosses(spec):
                continue
            keep = batch.mask_for(spec, leaf)
            real = leaf[row : row + 1] if keep is None or keep.shape[0] != batch.rows else leaf[row][keep[row]]
            signs = torch.randint(0, 2, real.shape, generator=generator).to(leaf.dtype).mul_(2).sub_(1)
            rows = max(1, real.numel() // real.shape[-1])
            total = total + (real * signs).sum() / rows**0.5
        return total


def _crosses(spec: Any) -> bool:
    """Whether a value has the samples on a second axis too, as similarities between them have."""
    shape: tuple[Any, ...] = getattr(spec, "shape", ())
    return bool(shape) and any(n == shape[0] for n in shape[1:] if hasattr(n, "free_symbols"))


def _predicts(labels: Any, architecture: str) -> bool:
    """Whether a sample has a token that counts."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 2:
        return True
    own = labels[:, 1:] if architecture.endswith(("ForCausalLM", "LMHeadModel")) else labels
    return bool((own != losses.IGNORED).any())


def _cache_leaves(tree: pytree.Tree) -> list[bool]:
    """For each flat output whether it is of a cache."""
    if tree["type"] == "cache":
        return [True] * pytree.leaves_in(tree)
    if tree["type"] == "tensor":
        return [False]
    return [flag for item in tree.get("items", ()) for flag in _cache_leaves(item)]
