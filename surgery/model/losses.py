"""The training losses of transformers' task heads, computed from the outputs of a captured model.

A capture holds the forward pass without labels. What a head adds when labels are given depends on the task only, so it is
found from the architecture's name. Every function returns the same number as the live class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.diagnostics import SurgeryError, fail

IGNORED = -100
Loss = Callable[[Mapping[str, Any], Mapping[str, Any], Any], Tensor]


@dataclass(frozen=True)
class Task:
    """What a head takes besides the inputs: ``arguments`` hold labels, ``required`` of them start the loss."""

    loss: Loss
    arguments: tuple[str, ...] = ("labels",)
    required: tuple[str, ...] = ("labels",)
    shifts_labels: bool = False
    """Whether missing decoder inputs are the labels moved one to the right."""


def task_of(architecture: str) -> Task | None:
    """The task of an architecture name such as ``BertForMaskedLM``; None for bodies and unknown heads."""
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def shift_right(labels: Tensor, config: Any) -> Tensor:
    """Decoder inputs ``[batch, length]`` of labels: start token in front, the last label dropped, ignored places padded."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        raise fail("S0831", "labels cannot become decoder inputs: the config has no decoder_start_token_id or no pad_token_id", help="pass decoder_input_ids, or set both ids in module.config")  # fmt: skip
    shifted = labels.new_zeros(labels.shape)
    shifted[:, 1:] = labels[:, :-1]
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)


def _tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over all tokens whose label is not -100."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.to(logits.device).reshape(-1))


def _causal(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    """Each position predicts the next token; ``num_items_in_batch`` turns the mean into a sum over a shared count."""
    logits = out["logits"].float()
    labels = F.pad(given["labels"], (0, 1), value=IGNORED)[..., 1:].contiguous().reshape(-1).to(logits.device)
    items = given.get("num_items_in_batch")
    logits = logits.view(-1, logits.shape[-1])
    if items is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _plain(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    return _tokens(out["logits"], given["labels"])


def _classes(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    """Regression, one class or several, as ``config.problem_type`` says or as labels and their number tell."""
    logits, labels = out["logits"], given["labels"].to(out["logits"].device)
    count = getattr(config, "num_labels", logits.shape[-1])
    kind = getattr(config, "problem_type", None)
    if kind is None:
        whole = labels.dtype in (torch.long, torch.int)
        kind = "regression" if count == 1 else "single_label_classification" if whole else "multi_label_classification"
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if count == 1 else F.mse_loss(logits, labels)
    if kind == "single_label_classification":
        return F.cross_entropy(logits.view(-1, count), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def _spans(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    """Mean of the cross entropies of start and end; positions behind the end of the input do not count."""
    total = None
    for side in ("start", "end"):
        logits, place = out[f"{side}_logits"], given[f"{side}_positions"]
        place = (place.squeeze(-1) if place.ndim > 1 else place).to(logits.device).clamp(0, logits.shape[1])
        loss = F.cross_entropy(logits, place, ignore_index=logits.shape[1])
        total = loss if total is None else total + loss
    assert total is not None
    return total / 2


def _choices(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    return F.cross_entropy(out["logits"], given["labels"].to(out["logits"].device))


def _pairs(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    return _tokens(out["logits"].view(-1, 2), given["labels"])


def _pretraining(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    pair = "next_sentence_label" if "next_sentence_label" in given else "sentence_order_label"
    relation = out.get("seq_relationship_logits", out.get("sop_logits"))
    return _tokens(out["prediction_logits"], given["labels"]) + _tokens(relation.view(-1, 2), given[pair])


def _contrast(out: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor:
    """Symmetric cross entropy of text and image similarities (Radford et al. 2021)."""
    similarity = out["logits_per_text"]
    target = torch.arange(similarity.shape[0], device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.t(), target)) / 2


_TASKS: dict[str, Task] = {
    "ForCausalLM": Task(_causal),
    "LMHeadModel": Task(_causal),
    "ForMaskedLM": Task(_plain),
    "ForConditionalGeneration": Task(_plain, shifts_labels=True),
    "ForSequenceClassification": Task(_classes),
    "ForImageClassification": Task(_classes),
    "ForAudioClassification": Task(_choices),
    "ForTokenClassification": Task(_plain),
    "ForQuestionAnswering": Task(_spans, ("start_positions", "end_positions"), ("start_positions", "end_positions")),
    "ForMultipleChoice": Task(_choices),
    "ForNextSentencePrediction": Task(_pairs),
    "BertForPreTraining": Task(_pretraining, ("labels", "next_sentence_label"), ("labels", "next_sentence_label")),
    "AlbertForPreTraining": Task(_pretraining, ("labels", "sentence_order_label"), ("labels", "sentence_order_label")),
    "CLIPModel": Task(_contrast, ("return_loss",), ("return_loss",)),
}


def compute(task: Task, outputs: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> Tensor | None:
    """The loss, or None when the labels that the task needs were not given. Raises S0831 when the outputs do not fit the task."""
    if any(given.get(name) is None or given.get(name) is False for name in task.required):
        return None
    try:
        return task.loss(outputs, given, config)
    except (KeyError, AttributeError) as err:
        raise unfit(err) from err


def unfit(err: Exception) -> SurgeryError:
    return fail(
        "S0831", f"no loss can be computed: the captured outputs lack {err}", help="compute the loss outside from the module's outputs"
    )
