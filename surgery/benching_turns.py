"""Time and memory: arms that take turns, medians with their spread, the peak of a process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE = 0.004
"""Seconds between two arms: threads of the one before stop spinning for work and leave the processor alone."""


LONG = 0.25
"""Seconds of a run from which on what lies in the caches before it is nothing beside what it reads itself."""


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, and the quarter and three quarter points of all runs."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """The distance of the quarter points as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def timing(seconds: list[float]) -> Timing:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    return Timing(statistics.median(seconds), low, high, len(seconds))


def take_turns(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = PAUSE,
    step: Callable[[int], None] = lambda done: None,
) -> dict[str, Timing]:
    """Runs every arm once a round, timed, right after a run that is not: an arm finds its own data in the caches and its threads awake, as in
    serving; one that takes longer than :data:`LONG` does without. A busy moment of the machine hits all arms alike; every second round goes backwards, so that no arm always follows the same one."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    warm: dict[str, bool] = {}
    for name, run in arms.items():
        start = clock()
        run()
        warm[name] = clock() - start < LONG
    for done in range(rounds):
        order = list(arms) if done % 2 == 0 else list(arms)[::-1]
        for name in order:
            run = arms[name]
            time.sleep(pause)
            if warm[name]:
                run()
            start = clock()
            run()
            found[name].append(clock() - start)
        step(done + 1)
    return {name: timing(values) for name, values in found.items()}


def peak_mib() -> float:
    """Highest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
