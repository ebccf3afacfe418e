from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.core.method import param
from surgery.passes.kinds.schedule import ScheduleMethod


@dataclass(frozen=True)
class Power(ScheduleMethod):
    """A learning rate that falls with a power of the tokens trained on, independent of how many will follow.

    After ``n`` tokens, with ``batch`` sequences per step:

        eta(n) = min(eta_max, batch a n^b)

    Warm-up is linear from 0 to ``eta(warmup_tokens)``, so the curve is continuous. With ``total_tokens`` and
    ``decay_tokens`` the last part decays exponentially: ``eta(total - decay) floor^(share of the decay)``, and 0 at the end. The
    paper says exponentially and no more; ``floor = 0.01`` is this program's choice. ``decay = linear`` goes straight to 0.
    State is the token count: resuming from it is exact, whatever the batch was.

        train power(batch = 256, warmup_tokens = 1B, total_tokens = 1000B, decay_tokens = 100B)

    Source: Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler", 2024, arXiv:2408.13359,
    equations 4 to 6.
    """

    batch: int = param(help="sequences per optimizer step", min=1)
    a: float = param(4.0, "amplitude", min=0)
    b: float = param(-0.51, "exponent of the token count", max=0)
    eta_max: float = param(0.02, "highest learning rate", min=0)
    warmup_tokens: int = param(0, "tokens of linear warm-up", min=0)
    total_tokens: int = param(0, "tokens of the whole training; 0 when the end is open (no decay)", min=0)
    decay_tokens: int = param(0, "tokens of the decay at the end", min=0)
    decay: Literal["exponential", "linear"] = param("exponential", "shape of the decay")
    floor: float = param(0.01, "share of the rate that the exponential decay reaches before it ends at 0", min=1e-8, max=1)

    def __post_init__(self) -> None:
        if self.decay_tokens and self.total_tokens < self.decay_tokens + self.warmup_tokens:
            raise ValueError("warm-up and decay do not fit into total_tokens")

    def plain(self, tokens: float) -> float:
        """``min(eta_max, batch a n^b)``."""
        return self.eta_max if tokens <= 0 else min(self.eta_max, self.batch * self.a * tokens**self.b)

    def lr(self, tokens: float) -> float:
        if tokens < self.warmup_tokens:
            return self.plain(self.warmup_tokens) * tokens / self.warmup_tokens
        start = self.total_tokens - self.decay_tokens
        if not self.decay_tokens or tokens <= start:
            return self.plain(tokens)
        share = (tokens - start) / self.decay_tokens
        if share >= 1:
            return 0.0
        return self.plain(start) * (self.floor**share if self.decay == "exponential" else 1 - share)
