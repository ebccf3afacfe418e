from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert_prompt import PromptMethod


@dataclass(frozen=True)
class Prompt(PromptMethod):
    """Trained embeddings of virtual tokens in front of a language model's input: prompt tuning.

    The model computes what it would with ``n`` further tokens in front whose embeddings are ``P [n, width]``: they have positions
    ``0 .. n - 1``, those of the real tokens move by ``n``, and padding is as it was. Outputs keep the positions of the real tokens only, and
    so do the caches that the model takes and returns. Adds ``n width`` parameters. ``init = words`` starts from the embeddings of tokens that
    are drawn from the vocabulary.

    In a causal model with a cache virtual tokens depend on no input, so the graph computes their keys and values once a call (in training, too:
    dropout draws one mask for them and not one for each row). Folding stores these and takes the rest out of the graph: ``2 n`` rows of a
    key head's width for each layer and key head.

    In an encoder, and in a model that takes no cache, they are rows of the sequence: they see every token and are seen, their token type is 0,
    and folding leaves them as they are. What the model pools from its first position it pools from the first virtual token, as peft has it;
    what it picks by an id or by the last token that is no padding it finds where it is.

        insert prompt(length = 20) on embed.tokens

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv:2104.08691, section 2.
    """

    exchange: ClassVar[bool] = True

    length: int = param(20, "virtual tokens in front", min=1)
    init: Literal["normal", "words"] = param("normal", "first embeddings: normal with the given deviation, or those of random tokens")
    std: float = param(0.02, "standard deviation of `init = normal`", min=0)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def entries(self) -> int:
        return self.length

    def tensors(self, width: int) -> tuple[TensorSpec, ...]:
        if self.init == "normal":
            return (TensorSpec("embeddings", (self.length, width), "normal", (0.0, self.std)),)
        return (TensorSpec("embeddings", (self.length, width), "words"),)

    def count(self, width: int) -> int:
        return self.length * width

    def embeddings(self, t: dict[str, Tensor]) -> Tensor:
        return t["embeddings"]


def words(table: Tensor, *, length: int, seed: int, **params: Any) -> Tensor:
    """Rows of an embedding table ``[vocabulary, width]``, drawn without replacement while it has enough of them."""
    rows = torch.randperm(table.shape[0], generator=torch.Generator().manual_seed(seed))
    return table.float()[rows.repeat(-(-length // table.shape[0]))[:length]]
