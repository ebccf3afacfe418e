"""The root of a captured transformers model: a ``PreTrainedModel`` whose forward pass is the captured graph.

It is what the Trainer, ``generate`` and other libraries expect: a config, the original keywords and output classes, labels that
give the loss. Nothing of the original modeling file is imported to load or run it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery.core.diagnostics import fail
from surgery.model import losses
from surgery.model.runtime import GraphBlock, GraphRoot
from surgery.model.runtime_call import Call

_EXTRAS = ("use_cache", "return_dict", "num_items_in_batch")


class CapturedPreTrained(GraphRoot, PreTrainedModel):  # type: ignore[misc]
    """A captured transformers model. Further outputs (attentions, hidden states) and other inputs than captured are refused."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _task: losses.Task | None = None
    _architecture = ""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, empty in (
            ("_keep_in_fp32_modules", set),
            ("_keep_in_fp32_modules_strict", set),
            ("_tp_plan", dict),
            ("_ep_plan", dict),
            ("_pp_plan", dict),
        ):
            setattr(self, name, empty())
        self._no_split_modules = {GraphBlock.__name__}

    def captured_forward(self, *args: Any, **kwargs: Any) -> Any:
        call, task = self._surgery_call, self._task
        extras = (*_EXTRAS, *task.arguments) if task else _EXTRAS
        given, other = call.arguments(args, kwargs, self._architecture, extras)
        if task is not None and task.shifts_labels and other.get("labels") is not None and "decoder_input_ids" in call.trees:
            if given.get("decoder_input_ids") is None:
                given["decoder_input_ids"] = losses.shift_right(other["labels"], self.config)
        dtype, device = self._surgery_target
        leaves = self.run_flat(call.flat(given, dtype, device))
        keep = other.get("use_cache")
        if keep is None:
            keep = getattr(self.config, "use_cache", True)
        out = call.result(leaves, given.get(call.cache) if call.cache else None, keep_cache=bool(keep))
        if task is not None:
            loss = losses.compute(task, out, other, self.config)
            if loss is not None:
                out = type(out)(loss=loss, **out)
        as_output = other.get("return_dict")
        if as_output is None:
            as_output = getattr(self.config, "return_dict", True)
        return out if as_output or not hasattr(out, "to_tuple") else out.to_tuple()

    # --- what transformers asks of a model ----------------------------------------------------------------------------

    @cached_property
    def _live_class(self) -> Any:
        import transformers

        return getattr(transformers, self._architecture, None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the live class takes ``num_items_in_batch``: the Trainer scales its loss accordingly."""
        live = self._live_class
        return live is None or any(p.kind is p.VAR_KEYWORD for p in inspect.signature(live.forward).parameters.values())

    def get_input_embeddings(self) -> nn.Module:
        """The first embedding of the vocabulary's size. Raises NotImplementedError when there is none, as transformers does."""
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        found = next((m for m in self.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size), None)
        if found is None:
            raise NotImplementedError(f"{self._architecture} has no token embedding")
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        if self._task is None:
            return None
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        heads = [m for m in self.modules() if isinstance(m, nn.Linear) and m.out_features == size]
        return heads[-1] if heads else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise self._fixed()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        raise self._fixed()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        current = self.get_input_embeddings()
        if new_num_tokens not in (None, current.num_embeddings):
            raise self._fixed()
        return current

    def _fixed(self) -> Exception:
        return fail(
            "S0832",
            "the vocabulary of a captured model cannot change",
            help="resize the embeddings of the original model, then run the spec on it",
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: tied names are one parameter from the start."""

    def init_weights(self) -> None:
        """Nothing to do: a captured model is built with its weights."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any) -> None:
        """Write a whole artifact, which :func:`surgery.load` opens; the Trainer's checkpoints are artifacts too."""
        if is_main_process:
            from surgery.model.artifact import save_trained

            save_trained(self, save_directory, state_dict=state_dict)


class CapturedGenerator(CapturedPreTrained, GenerationMixin):  # type: ignore[misc]
    """A captured causal language model: ``generate`` with a cache that the graph takes and returns, or without one."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plain = generation_config.cache_implementation in (None, "dynamic")
        if plain and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            from transformers.cache_utils import DynamicCache

            # Without a config: the graph holds the windows of sliding layers in its masks and wants whole keys and values.
            model_kwargs["past_key_values"] = DynamicCache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def make_root(record: Mapping[str, Any], call: Call) -> CapturedPreTrained:
    """An empty root for a record of a transformers model; :meth:`GraphRoot.adopt` fills it. S0826 for an unknown family."""
    info = record["info"]
    family, architecture = info["family"], info["architecture"] or "CapturedModel"
    if family not in CONFIG_MAPPING or not architecture.isidentifier():
        raise fail(
            "S0826", f"this transformers has no model type {family[:60]!r}", help="install the transformers version that wrote the artifact"
        )
    config = CONFIG_MAPPING[family].from_dict(dict(info["config"]))
    base = CapturedGenerator if call.cache and not getattr(config, "is_encoder_decoder", False) else CapturedPreTrained
    body = {
        "__module__": __name__, "config_class": type(config), "main_input_name": call.parameters[0] if call.parameters else "input_ids",
        "_task": losses.task_of(architecture), "_architecture": architecture, "forward": _forward_for(call, architecture),
    }  # fmt: skip
    root = type(architecture, (base,), body)(config)
    if isinstance(root, CapturedGenerator) and record.get("generation"):
        root.generation_config = GenerationConfig.from_dict(dict(record["generation"]))
    root.all_tied_weights_keys = dict(record["aliases"])
    root._tied_weights_keys = dict(record["aliases"])
    return root


def _forward_for(call: Call, architecture: str) -> Any:
    """A forward function whose signature names the captured inputs, then the labels: the Trainer and ``generate`` read it."""

    def forward(self: CapturedPreTrained, *args: Any, **kwargs: Any) -> Any:
        return self.captured_forward(*args, **kwargs)

    task = losses.task_of(architecture)
    kinds = inspect.Parameter
    names = [*call.parameters]
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    parameters += [kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    parameters += [
        kinds(n, kinds.KEYWORD_ONLY, default=None)
        for n in (*(task.arguments if task else ()), "use_cache", "return_dict")
        if n not in names
    ]
    parameters.append(kinds("kwargs", kinds.VAR_KEYWORD))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward
