"""How much the elements of parameters, and whole layers, matter: the scores by which structure is pruned.

Every score is float64, computed on one thread and in a fixed order. Larger is more important. ``W`` is a stored parameter, ``g`` its
gradient, ``X_c`` the values that meet its input feature ``c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef, Site
from surgery.core.source import Span
from surgery.model.data import Samples
from surgery.model.influence import cosines
from surgery.model.program import Program
from surgery.model.realise import one_thread
from surgery.model.study import Study
from surgery.model.study_run import CallHook, check_finite
from surgery.model.tally import Tally
from surgery.model.uses import Use, uses_of

Scored = tuple[str, Tensor, tuple[int, ...]]
"""A parameter's first name, its scores, and the axes of the parameter that the scores have."""

WITHOUT_DATA = ("magnitude", "l2")
WITH_DATA = ("taylor", "taylor_signed", "fisher", "taylor_mix", "wanda", "activation")
SCORES = (*WITHOUT_DATA, *WITH_DATA)


def element_scores(
    study: Study, program: Program, samples: Samples | None, score: str, names: Iterable[str], *, span: Span | None = None
) -> Iterator[Scored]:
    """The scores of the elements of parameters, one parameter at a time; tied names are one parameter.

    ==============  =================================================  =============================
    ``magnitude``   ``|W|``
    ``l2``          ``W^2`` (a sum over a unit, then a root, is its L2 norm)
    ``taylor``      ``|W g|``, g summed over the samples                LLM-Pruner, ``param_first``
    ``taylor_signed``  ``W g``; the size of a unit's sum is             LLM-Pruner, ``vectorize``
    ``fisher``      ``W^2 F``, F the mean of squared gradients of samples  LLM-Pruner, ``param_second``
    ``taylor_mix``  ``|W g - W^2 F / 2|``                              LLM-Pruner, ``param_mix``
    ``wanda``       ``|W| ||X_c||``                                     Sun et al. 2023, eq. 1
    ``activation``  mean ``|X_c|`` of each input feature
    ==============  =================================================  =============================

    ``||X_c||`` is the root of the sum of squares over real tokens, divided by the number of samples; experts see the tokens that are
    routed to them, a tap of a convolution the positions that it meets. A parameter in several products sums over them.

    Parameters that are in no product whose input can be seen (biases, gains, tables) have no ``wanda`` and no ``activation`` score and are
    left out; with every other score all named parameters come, in the order in which the scores are found. Scores have all axes of the
    parameter, ``activation`` only the input axis (and the experts' axis; for a depthwise convolution axis 0).

    Sources: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv:2305.11627, section 3.2; Sun et
    al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695, section 3.

    Raises S0752 and S0753 for weights and values that are not finite, S0754 when no named parameter can have the score.
    """
    wanted = list(dict.fromkeys(program.aliases.get(n, n) for n in names))
    if score in WITHOUT_DATA:
        yield from _sizes(study, program, score, wanted, span)
        return
    if score not in WITH_DATA:
        raise KeyError(score)
    assert samples is not None, f"{score} needs samples"
    if score in ("wanda", "activation"):
        yield from _inputs(study, program, samples, score, wanted, span)
    else:
        yield from _gradients(study, program, samples, score, wanted, span)


def weight(study: Study, program: Program, name: str, span: Span | None = None) -> Tensor:
    """A parameter as float64, known to be finite; ``span`` is the statement that needs it."""
    value = study.tensors.fresh(program, name, {})
    check_finite(name, value, span)
    return value.double()


def _sizes(study: Study, program: Program, score: str, names: Sequence[str], span: Span | None) -> Iterator[Scored]:
    for name in names:
        value = study.tensors.fresh(program, name, {})
        check_finite(name, value, span)
        value = value.abs().double()  # one wide copy in all
        yield name, (value if score == "magnitude" else value.square_()), tuple(range(value.ndim))


# ---------------------------------------------------------------- from inputs


def tallies(study: Study, program: Program, samples: Samples, names: Iterable[str], power: int) -> dict[str, list[Tally]]:
    """Sums of squares (``power`` 2) or magnitudes (1) of the inputs of every product that reads a parameter, by its first name."""
    found: dict[str, list[Tally]] = {}
    by_call: dict[Use, Tally] = {}
    hooks: dict[NodeRef, list[Tally]] = {}
    for name, uses in uses_of(program, names).items():
        shape = program.weights[name].shape
        for use in uses:
            tally = by_call.setdefault(use, Tally(use, shape, power))
            found.setdefault(name, []).append(tally)
            hooks.setdefault(use.ref, []).append(tally)

    def all_of(some: list[Tally]) -> CallHook:
        def hook(args: tuple[Any, ...], result: Any, keep: Callable[[int], Tensor | None]) -> None:
            for one in dict.fromkeys(some):
                one(args, result, keep)

        return hook

    calls = {ref: all_of(some) for ref, some in hooks.items()}
    if calls:
        study.observe(program, samples, calls=calls, text="reading calibration data")
    return {name: [t for t in some if t.total is not None] for name, some in found.items() if any(t.total is not None for t in some)}


def _inputs(study: Study, program: Program, samples: Samples, score: str, names: Sequence[str], span: Span | None) -> Iterator[Scored]:
    found = tallies(study, program, samples, names, 2 if score == "wanda" else 1)
    if not found:
        shown = ", ".join(f"`{n}`" for n in names[:3]) + (" ..." if len(names) > 3 else "")
        raise fail(
            "S0754", f"the score `{score}` says nothing of {shown}", span, "no input to look at",
            notes=("it needs a product of the parameter with values of the data: a linear map, a convolution, an expert",),
            help="use `magnitude` or `taylor` for biases, gains and tables",
        )  # fmt: skip
    for name in names:
        if name not in found:
            continue
        if score == "wanda":
            with one_thread():
                value = weight(study, program, name, span)
                scores = value.abs().mul_(_spread(found[name], tuple(value.shape)).div_(len(samples)).sqrt_())
            yield name, scores, tuple(range(value.ndim))
        else:
            mean = _mean(found[name], program.weights[name].shape)
            if mean is not None:
                yield name, *mean


def _spread(some: list[Tally], shape: tuple[int, ...]) -> Tensor:
    """Summed totals, shaped to be multiplied with the parameter; rows that several products read have the sum of them."""
    if all(t.use.rows is None for t in some):
        total = some[0].spread().clone()
        for other in some[1:]:
            total = total + other.spread()
        return total
    out = torch.zeros(shape, dtype=torch.float64)
    for tally in some:
        part = out
        if tally.use.rows is not None:
            axis, start, stop = tally.use.rows
            part = out.narrow(axis, start, stop - start)
        part += tally.spread()
    return out


def _mean(some: list[Tally], shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]] | None:
    """Mean magnitude of each input feature, and the axes it has: over all products that read the parameter."""
    first = some[0].use
    if any((t.use.kind, t.use.in_axis, t.use.expert_axis) != (first.kind, first.in_axis, first.expert_axis) for t in some):
        return None
    totals, counts = [], []
    axes: tuple[int, ...] = (first.in_axis,)
    for tally in some:
        total, count = tally.total, tally.count
        assert total is not None
        if first.kind == "conv":
            taps = total.shape[1:].numel()
            total, count = total.reshape(total.shape[0], -1).sum(1), count * taps
            if first.conv[3] != 1:
                if not first.conv[3] == total.shape[0] == shape[0]:
                    return None
                axes = (0,)
        if first.expert_axis is not None:
            axes = tuple(sorted((first.expert_axis, first.in_axis)))
            count = count.reshape(-1, 1)
            if first.expert_axis > first.in_axis:
                total, count = total.T, count.T
        totals.append(total)
        counts.append(count)
    total, count = torch.stack(totals).sum(0), sum(counts[1:], counts[0])
    return total / count.clamp(min=1), axes


# ---------------------------------------------------------------- from gradients


def _gradients(study: Study, program: Program, samples: Samples, score: str, names: Sequence[str], span: Span | None) -> Iterator[Scored]:
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    per_sample = score in ("fisher", "taylor_mix")
    for name, gradient, sample in study.each_gradient(program, samples, names, per_sample=per_sample):
        if not per_sample:
            value = weight(study, program, name, span) * gradient
            yield name, (value.abs_() if score == "taylor" else value), tuple(range(value.ndim))
            continue
        wide = gradient.double()
        squares[name] = squares[name].addcmul_(wide, wide) if name in squares else wide.square()
        if score == "taylor_mix":
            sums[name] = sums[name].add_(wide) if name in sums else wide.clone()
        if sample == len(samples) - 1:
            value = weight(study, program, name, span)
            second = value.square() * squares.pop(name).div_(len(samples))
            if score == "taylor_mix":
                second = (value * sums.pop(name) - second / 2).abs_()
            yield name, second, tuple(range(value.ndim))


# ---------------------------------------------------------------- layers


def layer_scores(study: Study, program: Program, samples: Samples, regions: Sequence[Site]) -> list[float]:
    """Block influence of each region: one minus the mean over real tokens of the cosine of what enters and what leaves it.

    A token whose cosine is undefined (a zero vector) counts as 0.5. Small values mark layers that change little; a region that changes the
    shape of what passes through it has the score infinity.
    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv:2403.03853, section 2.
    """
    found = cosines(study, program, samples, [(r, r) for r in regions])
    return [1.0 - float(torch.cat(c).mean()) if c else 0.0 for c in found]


def run_scores(study: Study, program: Program, samples: Samples, regions: Sequence[Site], length: int) -> list[float]:
    """Angular distance over each run of ``length`` consecutive regions: ``arccos(cos(x_i, x_{i + length})) / pi``, the mean over the
    last real token of each sample; entry ``i`` is of the run that starts at region ``i`` (there are ``len(regions) - length + 1``).

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv:2403.17887, section 3.
    """
    runs = [(regions[i], regions[i + length - 1]) for i in range(len(regions) - length + 1)]
    found = cosines(study, program, samples, runs, last=True)
    return [float((torch.cat(c).clamp(-1, 1).arccos() / torch.pi).mean()) if c else 0.0 for c in found]
