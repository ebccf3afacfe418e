"""Every free class of every family, cut and compared: the cut graph equals the original with the units masked away.

Two oracles. Masked execution removes the units from every value of the original graph, normalisers counting only what stays. Literal
zeroing of the removed parameter slices must agree too wherever no normaliser, softmax or selection sees the units.
"""

from __future__ import annotations

import pytest
import torch

from tests.dims_models import MODELS, dynamic
from tests.dims_support import check, cut, error, floats, select_outputs, trace, zeroed

# free classes that the family must have: fewer means that a rule froze something it should not
FREE = {
    "bert": 10, "roberta": 10, "distilbert": 9, "albert": 7, "deberta": 10, "gpt2": 9, "llama": 11, "llama_eager": 11, "qwen3": 11, "gemma3": 10,
    "phi3": 11, "mixtral": 13, "qwen2_moe": 15, "gpt_oss": 13, "gpt_neox": 11, "gptj": 12, "bloom": 5, "falcon": 6, "falcon_mqa": 4, "opt": 9,
    "mpt": 7, "t5": 20, "bart": 12, "marian": 12, "whisper": 14, "vit": 10, "dinov2": 9, "beit": 9, "clip": 19, "swin": 14, "segformer": 10,
    "resnet": 5, "resnet_bottleneck": 7, "regnet": 11, "mobilenet_v2": 25, "convnext": 4, "encoder": 6,
    "conformer": 18, "wav2vec2": 12, "siglip": 13, "mobilebert": 21, "squeezebert": 11, "swinv2": 20, "pvt": 10, "levit": 26,
    "poolformer": 8, "xlnet": 9, "deepseek_v3": 18, "shuffle": 2, "dense": 5, "mamba2": 10,
}  # fmt: skip
# writes into slices of an empty tensor: masking a value does not reach its views, so only literal zeroing is an oracle there
IN_PLACE = {"deepseek_v3"}
NORMALISED = {"norm", "softmax", "topk", "reduce:mean", "reduce:var", "reduce:norm", "reduce:max"}


@pytest.mark.parametrize("name", MODELS)
def test_every_free_class_can_be_cut(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    case = trace(model, inputs, dynamic(inputs))
    assert not case.dims.unknown
    before = case.run()
    free = [leaf for leaf in case.dims.all_leaves() if leaf.free]
    assert len(free) == FREE[name]
    scale = max(float(t.abs().max()) for t in before)
    tolerance = 1e-5 * min(1.0, scale)
    moved = 0
    for i, leaf in enumerate(free):
        units = [leaf.size - 1] if i % 2 or leaf.size < 3 else [0, leaf.size - 2]
        group = case.dims.remove({leaf: units})
        if "picks" in group.refusal:
            continue
        if name not in IN_PLACE or leaf.flags & NORMALISED:
            assert check(case, group) <= tolerance, str(group)
        with torch.no_grad():
            after = floats(cut(case, group)(*case.inputs))
        kept = select_outputs(case, group, before)
        moved += error(after, kept) > 1e-6 * scale
        if not leaf.flags & NORMALISED:
            assert check(case, group, oracle=zeroed) <= tolerance, str(group)
    assert moved >= 0.5 * len(free), "the cuts do not change the result: the comparison would prove nothing"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "vit", "resnet"])
def test_several_classes_go_in_one_cut(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    case = trace(model, inputs, dynamic(inputs))
    free = [leaf for leaf in case.dims.all_leaves() if leaf.free and leaf.size > 2]
    group = case.dims.remove({leaf: [0, leaf.size - 1] if leaf.size > 4 else [1] for leaf in free})
    assert check(case, group) <= 1e-5
