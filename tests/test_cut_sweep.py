"""Classes of every captured family, cut from the whole program and compared with the original under masks.

``SURGERY_FULL_SWEEP=1`` cuts every free class by one and by two units; otherwise a few of each family are taken.
"""

from __future__ import annotations

import pytest
import torch

from surgery.model import oracle, pytree
from surgery.opening import capture
from tests.captured_programs import zoo_program
from tests.cut_support import FULL, NORMALISED, difference, free, observed_specs, remove, same_classes, sample, some_units
from tests.dims_models import MODELS
from tests.zoo import CAPTURABLE

# free classes that the family must have: fewer means that a rule froze something it should not
FREE = {
    "bert": 14, "roberta": 14, "distilbert": 13, "albert": 7, "deberta-v2": 13, "gpt2": 13, "llama": 15, "qwen3": 15, "gemma3_text": 27,
    "phi3": 15, "mixtral": 18, "t5": 28, "bart": 34, "whisper": 36, "vit": 14, "swin": 26, "clip": 27, "wav2vec2-conformer": 22, "resnet": 15,
    "convnext": 8, "audio-spectrogram-transformer": 13,
}  # fmt: skip


@pytest.mark.parametrize("family", CAPTURABLE)
def test_a_cut_program_equals_the_masked_original(family):
    program, inputs = zoo_program(family)
    leaves = free(program.dims)
    assert len(leaves) == FREE[family]
    moved = 0
    chosen = sample(leaves)
    for i, leaf in enumerate(chosen):
        for units in ([leaf.size - 1], [0, leaf.size - 2]) if FULL and leaf.size > 2 else (some_units(leaf, i),):
            if "picks" in program.dims.remove({leaf: units}).refusal:
                continue
            done = remove(program, {leaf: units})
            assert done.error(inputs) <= 1e-5, str(done.group)
            if not leaf.flags & NORMALISED:
                assert done.literal_error(inputs) <= 1e-5, str(done.group)
            same_classes(done)
            moved += bool(done.result.removed)
            assert all(n > 0 for n in done.result.removed.values())
    assert moved >= len(chosen) - 1


@pytest.mark.parametrize("family", ["bert", "phi3", "t5", "swin", "mixtral", "resnet"])
def test_several_classes_go_at_once_and_specs_say_what_runs(family):
    program, inputs = zoo_program(family)
    before = remove(program, {}).run(inputs)
    units = {leaf: some_units(leaf, i) for i, leaf in enumerate(free(program.dims)) if leaf.size > 2}
    for leaf in list(units):
        if program.dims.picks(leaf.axis):
            units[leaf] = [0]
    done = remove(program, units)
    assert done.error(inputs) <= 1e-5
    assert list(observed_specs(done.after, oracle.cut_inputs(done.group, inputs))) == []
    if [t.shape for t in done.run(inputs)] == [t.shape for t in before]:
        assert difference(done.run(inputs), before) > 1e-3, "the cut changes nothing: the comparison would prove nothing"
    # cut again what is left, from the second analysis
    again = [leaf for leaf in free(done.after.dims) if leaf.size > 2][:3]
    twice = remove(done.after, {leaf: [1] for leaf in again})
    assert twice.error(oracle.cut_inputs(done.group, inputs)) <= 1e-5


# Families beyond the zoo, captured as live modules with example inputs. The suite takes the plain modules; a full sweep all of them.
NO_VALUES = {"falcon", "falcon_mqa"}
"""Their code indexes with a Python list, whose values a capture on meta tensors does not keep."""
FURTHER = [name for name in MODELS if name.replace("_", "-") not in CAPTURABLE and name not in NO_VALUES]
PLAIN = ["shuffle", "dense", "encoder"]
IN_PLACE = {"deepseek_v3"}
"""Writes into slices of an empty tensor: masking a value does not reach its views, so only literal zeroing is an oracle there."""


@pytest.mark.parametrize("name", FURTHER if FULL else PLAIN)
def test_a_cut_live_module_equals_the_masked_original(name):
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
    program = capture(model, dict(example), dynamic={k: {0: "batch"} for k in example})
    inputs = flat_of(program, example)
    leaves = free(program.dims)
    assert len(leaves) >= 2
    for i, leaf in enumerate(sample(leaves)):
        units = some_units(leaf, i)
        if "picks" in program.dims.remove({leaf: units}).refusal:
            continue
        done = remove(program, {leaf: units})
        if name not in IN_PLACE or leaf.flags & NORMALISED:
            assert done.error(inputs) <= 1e-5, str(done.group)
        if not leaf.flags & NORMALISED:
            assert done.literal_error(inputs) <= 1e-5, str(done.group)
        same_classes(done)


def flat_of(program, example):
    given = {k: example[k] for k in program.signature.parameters}
    return pytree.flatten(given, program.signature.in_spec)
