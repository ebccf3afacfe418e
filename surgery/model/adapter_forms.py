"""Adapter files of other kinds than LoRA, read into the same form: what their tensors are called and how thin factors, or a whole weight, come from them.

Four kinds are products of thin factors in another guise, and become factors exactly:

==========  ===================================================  ==================================================================
AdaLoRA     ``lora_A [r, in]``, ``lora_E [r, 1]``, ``lora_B``     ``B (E * A)``, scale ``alpha / (init_r + 1e-5)``
VeRA        ``vera_lambda_b [out]``, ``vera_lambda_d [r]``        ``(b * B) (d * A)`` with the first rows and columns of ``vera_A``, ``vera_B``
LoHa        ``hada_w1_a``, ``hada_w1_b``, ``hada_w2_a``, ...      ``(a1 b1) * (a2 b2)``: columns times columns, rank ``r^2``
LoKr        ``lokr_w1`` or its factors, ``lokr_w2`` or its        the Kronecker product of both: that of their factors
==========  ===================================================  ==================================================================

Two change a weight by as much as it has: IA3 (``ia3_l``) stretches outputs or inputs, OFT (``oft_R``) turns the inputs. They replace the
weight by a function of it. The functions are named here and computed in ``surgery.passes.kinds.adapter_forms``.

Sources: AdaLoRA arXiv:2303.10512, VeRA arXiv:2310.11454, LoHa arXiv:2108.06098, LoKr arXiv:2309.14859, IA3 arXiv:2205.05638, OFT
arXiv:2306.07280; names and scales are those of peft's folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.core.diagnostics import SurgeryError
from surgery.model.checkpoint_headers import TensorHeader
from surgery.model.weights import Apply, Expr, Load, is_float

FUNCTIONS = "kinds/adapter_forms"
"""Where the functions of these expressions are, for the resolver of functions."""

TASK = "the task asked for"
"""Where the task of a statement stands beside the fields of a config; no field has this name."""

Roles = Mapping[str, TensorHeader]
Fault = Callable[..., SurgeryError]


@dataclass(frozen=True)
class Thin:
    """A change of thin factors: ``a`` ``[rank, in]`` and ``b`` ``[out, rank]`` as expressions, both flat for convolutions. ``shared`` says
    that ``a`` and its tensors are longer than the layer's inputs, of which it has the first."""

    a: Expr
    b: Expr
    rank: int
    scale: float
    shared: bool = False


@dataclass(frozen=True)
class Dense:
    """A weight that is a function of itself: ``function`` of the stored weight and ``tensors``, ``params`` for it; ``stretch`` what the bias is
    multiplied by, if it is. ``size`` is the length that ``axis`` (``out`` or ``in``) of the weight must have, ``out`` how many outputs it must have (0: any).
    A ``function`` of another module than :data:`FUNCTIONS` is named in full (empty: the weight stays), and so is that of the ``bias``, if it has one;
    with ``reads_weight`` that gets the weight in front of its ``bias_tensors`` (None: those of the weight, with its parameters). ``adds`` says that what is added does not depend on the weight."""

    path: str
    function: str
    tensors: tuple[Load, ...]
    params: tuple[tuple[str, Any], ...]
    axis: str
    size: int
    stretch: Load | None = None
    out: int = 0
    bias: str = ""
    adds: bool = False
    reads_weight: bool = False
    bias_tensors: tuple[Load, ...] | None = None
    bias_params: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Kind:
    """How one kind of folder is read: the role of a tensor by the end of its key, the config fields that are known, and what a layer becomes.

    ``shared`` are tensors of the whole folder, several of a name (``NAME.part``) where they are ``parted``; ``refused`` says why tensors with such a
    word in their key are not read, ``against`` of a config why nothing is. ``tasks`` is the field that counts tasks of which one is taken."""

    name: str
    roles: Mapping[str, str]
    fields: frozenset[str]
    read: Callable[[str, Roles, Mapping[str, Any], Roles, Fault], Thin | Dense]
    shared: frozenset[str] = frozenset()
    refused: Mapping[str, str] | None = None
    parted: bool = False
    against: Callable[[Mapping[str, Any]], str] | None = None
    tasks: str = ""


QUIET = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "modules_to_save", "peft_type", "peft_version", "r", "revision", "target_modules", "task_type", "init_weights", "rank_dropout", "module_dropout",
})  # fmt: skip
"""Fields that say nothing about what a trained adapter of any of these kinds computes, or that every one has."""


# ------------------------------------------------------------------ thin factors


def _thin(path: str, form: str, tensors: tuple[Load, ...], rank: int, out: int, inp: int, scale: float, shared: bool = False) -> Thin:
    made = [
        Apply(shape, "float32", f"{FUNCTIONS}:{form}", tensors, (), i) for i, shape in enumerate(((rank, inp), (out, rank)))
    ]  # fmt: skip
    return Thin(made[0], made[1], rank, scale, shared)


def need(path: str, roles: Roles, names: tuple[str, ...], fault: Fault) -> list[TensorHeader]:
    missing = next((n for n in names if n not in roles), None)
    if missing:
        raise fault(f"`{path}` has no `{missing}`")
    odd = next((roles[n] for n in names if (not is_float(roles[n].dtype) and "indices" not in n) or 0 in roles[n].shape), None)
    if odd is not None:
        raise fault(f"`{odd.key}` is {odd.dtype} {list(odd.shape)}, where a trained tensor is expected")
    return [roles[n] for n in names]


def matrices(path: str, headers: list[TensorHeader], fault: Fault) -> None:
    bad = next((h for h in headers if len(h.shape) != 2 or 0 in h.shape), None)
    if bad is not None:
        raise fault(f"`{bad.key}` has the shape {list(bad.shape)}, not that of a factor")


def number(config: Mapping[str, Any], key: str, default: float, fault: Fault) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise fault(f"`{key}` is {value!r}, not a number", "correct the config of the adapter")
    return float(value)


def whole_number(config: Mapping[str, Any], key: str, default: int, fault: Fault) -> int:
    value = number(config, key, default, fault)
    if value != int(value):
        raise fault(f"`{key}` is {value:g}, not a whole number", "correct the config of the adapter")
    return int(value)


def _adalora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    a, e, b = need(path, roles, ("lora_A", "lora_E", "lora_B"), fault)
    matrices(path, [a, e, b], fault)
    rank = a.shape[0]
    if e.shape != (rank, 1) or b.shape[1] != rank:
        raise fault(f"`{path}` has factors and singular values of the shapes {list(a.shape)}, {list(e.shape)} and {list(b.shape)}")
    first = number(config, "init_r", 12, fault)
    alpha = number(config, "lora_alpha", 8, fault)
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    return _thin(path, "adalora", (a.load(), e.load(), b.load()), rank, b.shape[0], a.shape[1], scale)


def projections(path: str, shared: Roles, kind: str, fault: Fault) -> tuple[TensorHeader, TensorHeader]:
    """The two random matrices that all sites of VeRA and its like share."""
    if f"{kind}_A" not in shared or f"{kind}_B" not in shared:
        raise fault(
            "the random projections of the adapter are not in its folder (`save_projection = false`)",
            "save it with `save_projection = True`",
        )
    first, second = shared[f"{kind}_A"], shared[f"{kind}_B"]
    matrices(path, [first, second], fault)
    return first, second


def _vera(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    b, d = need(path, roles, ("vera_lambda_b", "vera_lambda_d"), fault)
    first, second = projections(path, shared, "vera", fault)
    rank = d.shape[0]
    if first.shape[0] != rank or second.shape[1] != rank or len(b.shape) != 1 or b.shape[0] > second.shape[0]:
        raise fault(
            f"`{path}` has gains of the shapes {list(b.shape)} and {list(d.shape)} for projections {list(first.shape)} and {list(second.shape)}"
        )
    loads = (b.load(), d.load(), first.load(), second.load())
    return _thin(path, "vera", loads, rank, b.shape[0], first.shape[1], 1.0, shared=True)


def _loha(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    found = need(path, roles, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), fault)
    matrices(path, found, fault)
    rank, out, inp = found[0].shape[1], found[0].shape[0], found[1].shape[1]
    if any(h.shape != s for h, s in zip(found, ((out, rank), (rank, inp)) * 2, strict=True)):
        raise fault(f"`{path}` has factors of the shapes {', '.join(str(list(h.shape)) for h in found)}, which do not go together")
    scale = patterned(config, "alpha_pattern", path, number(config, "alpha", 8, fault)) / rank
    return _thin(path, "loha", tuple(h.load() for h in found), rank * rank, out, inp, scale)


def _lokr(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    sides: list[tuple[Load, ...]] = []
    rank = 1
    sizes: list[tuple[int, int]] = []
    # the scale is that of the rank which the config says, whatever side has factors
    own = patterned(config, "rank_pattern", path, number(config, "r", 8, fault))
    if own < 1 or own != int(own):
        raise fault(f"the rank of `{path}` is {own:g} by its config", "correct `r` or `rank_pattern`")
    for side in ("lokr_w1", "lokr_w2"):
        if side in roles:
            header = roles[side]
            if len(header.shape) < 2 or 0 in header.shape:
                raise fault(f"`{header.key}` has the shape {list(header.shape)}, not that of a side of a product")
            out, inp = header.shape[0], math.prod(header.shape[1:])
            thin = (side == "lokr_w2" or bool(config.get("decompose_both"))) and own < max(header.shape[:2]) / 2
            sides.append((header.load(),))
            rank *= min(out, inp)
        else:
            a, b = need(path, roles, (f"{side}_a", f"{side}_b"), fault)
            matrices(path, [a, b], fault)
            if a.shape[1] != b.shape[0]:
                raise fault(f"`{path}` has factors of the shapes {list(a.shape)} and {list(b.shape)}, which do not go together")
            out, inp = a.shape[0], b.shape[1]
            sides.append((a.load(), b.load()))
            rank *= a.shape[1]
            thin = a.shape[1] == own and own < max(out, inp) / 2 and (side == "lokr_w2" or bool(config.get("decompose_both")))
        if thin != (side not in roles):
            word = "factors" if side not in roles else "a side as it is"
            raise fault(
                f"`{path}` has {word} for `{side}`, which does not go with a rank of {own:g}",
                "correct `r`, `rank_pattern` or `decompose_both`",
            )
        sizes.append((out, inp))
    scale = patterned(config, "alpha_pattern", path, number(config, "alpha", 8, fault)) / own
    form = "lokr_" + "".join("f" if len(s) == 1 else "t" for s in sides)
    loads = tuple(t for s in sides for t in s)
    return _thin(path, form, loads, rank, sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1], scale)


def patterned(config: Mapping[str, Any], field: str, path: str, default: float) -> float:
    """The value of the first pattern that the end of a path matches."""
    table = config.get(field) or {}
    for pattern, value in table.items() if isinstance(table, Mapping) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path) and isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        except re.error:
            continue
    return default


# ------------------------------------------------------------------ whole weights


def _ia3(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (gain,) = need(path, roles, ("ia3_l",), fault)
    given = config.get("feedforward_modules") or []
    try:
        inner = bool(re.fullmatch(given, path)) if isinstance(given, str) else any(path.endswith(g) for g in given)
    except (TypeError, re.error):
        raise fault("`feedforward_modules` is no list of names and no pattern", "correct the config of the adapter") from None
    if len(gain.shape) == 2 and 1 in gain.shape and gain.shape != (1, 1) and inner != (gain.shape[0] == 1):
        side = "inputs" if gain.shape[0] == 1 else "outputs"
        raise fault(f"`{path}` has gains of its {side}, and its config says otherwise", "correct `feedforward_modules`")
    size, load = math.prod(gain.shape), gain.load()
    axis = "in" if inner else "out"
    return Dense(path, "stretched", (load,), (), axis, size, None if inner else load)


def _oft(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (turn,) = need(path, roles, ("oft_R",), fault)
    blocks, entries = turn.shape if len(turn.shape) == 2 else (0, 0)
    block = round((1 + math.sqrt(1 + 8 * entries)) / 2)
    if not entries or block * (block - 1) // 2 != entries:
        raise fault(f"`{turn.key}` has the shape {list(turn.shape)}, not that of skew-symmetric blocks")
    alone = bool(config.get("block_share"))
    if alone and blocks != 1:
        raise fault(f"`{turn.key}` has {blocks} blocks, and its config says that all are one (`block_share`)")
    terms = int(number(config, "num_cayley_neumann_terms", 5, fault)) if config.get("use_cayley_neumann", True) else 0
    if config.get("use_cayley_neumann", True) and terms < 1:
        raise fault(f"`num_cayley_neumann_terms` is {terms}, and a sum has at least one", "correct the config of the adapter")
    bound = (("most", number(config, "eps", 6e-5, fault) / math.sqrt(blocks)),) if config.get("coft") else ()
    if bound and bound[0][1] <= 0:
        raise fault("`eps` leaves no turn at all", "correct the config of the adapter")
    params = (("block", block), ("terms", terms), *bound)
    return Dense(path, "turned", (turn.load(),), params, "in", 0 if alone else blocks * block)


KINDS: Mapping[str, Kind] = {
    "ADALORA": Kind(
        "AdaLoRA", {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
        QUIET | {
            "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern", "lora_alpha",
            "lora_dropout", "init_lora_weights", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "megatron_config", "megatron_core",
            "runtime_config", "use_rslora", "alpha_pattern", "qalora_group_size",
        },
        _adalora,
    ),
    "VERA": Kind(
        "VeRA", {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
        QUIET | {"projection_prng_key", "save_projection", "vera_dropout", "d_initial"}, _vera, frozenset({"vera_A", "vera_B"}),
    ),
    "LOHA": Kind(
        "LoHa", {n: n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
        QUIET | {"alpha", "alpha_pattern", "rank_pattern", "use_effective_conv2d"}, _loha,
        refused={"hada_t": "a core of its own for the kernel (`use_effective_conv2d`)"},
    ),
    "LOKR": Kind(
        "LoKr", {n: n for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
        QUIET | {"alpha", "alpha_pattern", "rank_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"}, _lokr,
        refused={"lokr_t2": "a core of its own for the kernel (`use_effective_conv2d`)"},
    ),
    "IA3": Kind("IA3", {"ia3_l": "ia3_l"}, QUIET | {"feedforward_modules", "init_ia3_weights"}, _ia3),
    "OFT": Kind(
        "OFT", {"oft_R": "oft_R"},
        QUIET | {"oft_block_size", "eps", "coft", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}, _oft,
    ),
}  # fmt: skip
"""The kinds by ``peft_type``."""

WHY_NOT: Mapping[str, str] = {
    "ADAMSS": "which outputs each of its parts changes comes from a clustering of the base that the folder does not hold",
    "PSOFT": "it turns singular vectors of the base by their signs, which every machine chooses anew and the folder does not hold",
    "XLORA": "its mixture is another one for every input, which no weight has",
    "LILY": "its mixture is another one for every input, which no weight has",
    "SHADOW": "it runs a model of its own beside the base",
    "ADAPTION_PROMPT": "its prompts pass gates inside of attention, which is no change of a weight",
}
"""Kinds that are not read, with the reason, beside those that nobody here knows."""
