from __future__ import annotations

import math
from dataclasses import dataclass, replace

from surgery.core.method import param
from surgery.model.program import Program
from surgery.passes.kinds.schedule import ScheduleMethod


@dataclass(frozen=True)
class StepLaw(ScheduleMethod):
    """Learning rate and batch size from the model's size and the number of training tokens.

    With ``N`` parameters (embeddings and head not counted) and ``D`` training tokens the best peak rate and batch (in tokens) are

        eta = 1.79 N^-0.713 D^0.307          B = 0.58 D^0.571

    for AdamW with a linear warm-up of ``warmup_steps`` and a cosine decay to a fixed final rate. ``parameters = 0`` counts
    the model as it is after the surgery so far, frozen weights included. The law was fitted on pretraining from scratch;
    for fine-tuning and adapters it is a starting point only, and the plan says so. Expect up to a factor of 2 per point.

        train step_law(tokens = 100B)

    Source: Li et al., "Predictable Scale: Part I, Step Law", 2025, arXiv:2503.04715, equation 1.
    """

    tokens: int = param(help="tokens of the whole training", min=1)
    parameters: int = param(0, "parameters without embeddings and head; 0 counts them", min=0)
    warmup_steps: int = param(2000, "steps of linear warm-up", min=0)
    final_lr: float = param(1e-5, "rate at the end of the cosine", min=0)
    batch_tokens: int = param(0, "tokens per step; 0 takes the law's batch", min=0)
    partial: bool = False

    def peak(self) -> float:
        """The law's peak learning rate."""
        return 1.79 * self.parameters**-0.713 * self.tokens**0.307

    def batch(self) -> float:
        """The law's batch size in tokens."""
        return 0.58 * self.tokens**0.571

    def sequences(self, length: int, multiple: int = 1) -> int:
        """The law's batch in sequences of ``length`` tokens, rounded to a multiple (data parallel ranks x micro-batch)."""
        return max(multiple, round(self.batch() / length / multiple) * multiple)

    def bound(self, program: Program) -> StepLaw:
        vocabulary = {
            program.aliases.get(n, n)
            for s in program.anatomy.sites if s.role.rpartition(".")[2] == "head" or ".tokens" in "." + s.role or s.role == "head"
            for n in (s.weight, s.bias) if n
        }  # fmt: skip
        names = {program.aliases.get(n, n) for n, _ in program.graph.named_parameters(remove_duplicate=False)}
        sizes = {n: math.prod(program.weights[n].shape) for n in names if n in program.weights}
        counted = self.parameters or sum(size for n, size in sizes.items() if n not in vocabulary)
        return replace(self, parameters=counted, partial=bool(program.frozen & names))

    def note(self) -> str:
        text = f"N = {self.parameters:,}, peak rate {self.peak():.4g}, batch {round(self.batch()):,} tokens"
        if self.partial:
            text += "; warning: the law was fitted on full pretraining, and a part of this model is frozen"
        return text

    def lr(self, tokens: float) -> float:
        batch = self.batch_tokens or self.batch()
        warmup = min(self.warmup_steps * batch, self.tokens)
        peak = self.peak()
        if tokens < warmup:
            return peak * tokens / warmup
        share = min(1.0, (tokens - warmup) / max(1.0, self.tokens - warmup))
        return self.final_lr + (peak - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))
