"""The idealised runtime of a model: what a request costs by its number of prompt and output tokens.

``T(p, o) = F(p) + g (o - 1)`` for ``o >= 1`` output tokens, ``F(p)`` alone for none: ``F`` is the measured time to read ``p`` tokens and give
the first one, as a table; ``g`` the time of each further token, the slope of a least-squares line through all runs. Encoders have ``F`` only.

Source: Narayanan et al., "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer APIs", 2023,
arXiv:2305.02440, section 3.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from surgery.benching_feeds import Arrays, Input, arrays
from surgery.benching_turns import PAUSE


@dataclass(frozen=True)
class Ideal:
    """``table``: seconds of ``F`` by number of prompt tokens; ``step``: ``g`` in seconds, None for an encoder; ``r2``: how well the line fits."""

    table: Mapping[int, float]
    step: float | None = None
    r2: float | None = None

    def first(self, prompt: int) -> float:
        """``F(p)`` in seconds: the entry of the next larger length, scaled by the share of it; beyond the table the last one, scaled."""
        keys = sorted(self.table)
        key = next((k for k in keys if k >= prompt), keys[-1])
        return self.table[key] * prompt / key if key else self.table[key]

    def runtime(self, prompt: int, output: int = 1) -> float:
        """``T(p, o)`` in seconds. Raises ValueError for several tokens of an encoder."""
        if output <= 1:
            return self.first(prompt)
        if self.step is None:
            raise ValueError("an encoder gives no further tokens")
        return self.first(prompt) + self.step * (output - 1)


def fit(runs: Sequence[tuple[int, int, float]]) -> Ideal:
    """From measured ``(prompt, output, seconds)``: the table from the runs of one token, the slope from all of them.

    The line is that of ``T - F(p)`` over ``o``, with an intercept of its own, as in the source. Without runs of several tokens there is no slope.
    """
    firsts: dict[int, list[float]] = {}
    for prompt, output, seconds in runs:
        if output == 1:
            firsts.setdefault(prompt, []).append(seconds)
    table = {p: statistics.median(values) for p, values in sorted(firsts.items())}
    points = [(o, seconds - table[p]) for p, o, seconds in runs if p in table]
    if len({o for o, _ in points}) < 2:
        return Ideal(table)
    x, y = np.array([o for o, _ in points], float), np.array([t for _, t in points], float)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / (dx * dx).sum())
    rest = float(((dy - slope * dx) ** 2).sum())
    return Ideal(table, slope, 1.0 - rest / float((dy * dy).sum()) if float((dy * dy).sum()) else 1.0)


Prepared = Callable[[Arrays], Callable[[], Arrays]]
"""From inputs to a call that gives named outputs (a cache as ``present.LAYER.key``)."""


def generate(prepare: Prepared, inputs: Sequence[Input], prompt: int, output: int) -> list[int]:
    """Greedy tokens of one request through the cache: the prompt in one pass, then one token a pass."""
    feeds = arrays(inputs, 1, prompt, 0)
    tokens: list[int] = []
    for at in range(output):
        out = prepare(feeds)()
        tokens.append(int(np.asarray(out["logits"])[0, -1].argmax()))
        if at + 1 < output:
            past = prompt + at
            feeds = arrays([i for i in inputs if not i.is_cache], 1, 1, past)
            feeds |= {i.name: out[i.name.replace("past_key_values", "present", 1)] for i in inputs if i.is_cache}
            for i in inputs:
                if "input_ids" in i.name:
                    feeds[i.name] = np.full_like(feeds[i.name], tokens[-1])
    return tokens


def profile(
    arms: Mapping[str, tuple[Prepared, Sequence[Input]]], prompts: Sequence[int], outputs: Sequence[int], rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ideal]:  # fmt: skip
    """Measures the idealised runtime of each arm at batch 1; the arms take turns. Arms with a cache give several tokens, others only ``F``."""
    runs: dict[str, list[tuple[int, int, float]]] = {name: [] for name in arms}
    for prompt in prompts:
        calls: dict[str, dict[int, Callable[[], Any]]] = {}
        for name, (prepare, inputs) in arms.items():
            if any(i.is_cache for i in inputs):
                wanted = sorted({1, *outputs})
                calls[name] = {o: partial(generate, prepare, inputs, prompt, o) for o in wanted}
            else:
                calls[name] = {1: prepare(arrays(inputs, 1, prompt))}
        for _ in range(rounds):
            for name, by_output in calls.items():
                for output, call in by_output.items():
                    time.sleep(PAUSE)
                    call()
                    start = clock()
                    call()
                    runs[name].append((prompt, output, clock() - start))
    return {name: fit(found) for name, found in runs.items()}
