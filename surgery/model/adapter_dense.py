"""Adapter files whose layers change a weight by as much as it has, or by thin factors of their own make, beside those of :mod:`adapter_forms`.

=============  ===============================================  ===========================================================================
BOFT           ``boft_R [factors, blocks, b, b]``, ``boft_s``   ``diag(s) W B^T``, ``B`` a product of permuted block diagonals of turns
HRA            ``hra_u [in, r]``                                ``W`` times the reflections at the columns
MiSS           ``miss_block``                                   one block added to every block of columns; ``bat`` also multiplies by it
C3A            ``c3a_kernel [out / b, in / b, b]``              plus blocks that are circulant, over the number of inputs
DeLoRA         ``delora_A``, ``_B``, ``_lambda``, ``_w_norm``   plus ``lambda / r  sum_i b_i a_i / (|b_i| |a_i|)``, columns times ``w_norm``
GraLoRA        ``gralora_A``, ``gralora_B``, hybrid factors     plus thin factors for each of ``k x k`` blocks, whose middles are exchanged
HiRA           ``hira_A``, ``hira_B``                           ``W * (1 + B A)`` element by element
RandLoRA       ``randlora_lambda``, ``_gamma``, shared bases    plus a sum of random bases with trained scales
SHiRA          ``shira_weight``, ``shira_indices``              plus single elements
VB-LoRA        ``vblora_logits_A``, ``_B``, a shared bank       plus factors that are mixtures of the bank's vectors
RoAd           ``road_theta``, ``road_alpha``                   pairs of outputs are turned and stretched, with the bias
FourierFT      ``fourierft_spectrum``                           plus the inverse transform of a few frequencies
=============  ===============================================  ===========================================================================

Two say nothing of a layer's product: LN_TUNING holds norms that were trained whole, TRAINABLE_TOKENS rows of a table.

Sources: BOFT arXiv:2311.06243, HRA arXiv:2405.17484, MiSS arXiv:2409.15371, C3A arXiv:2407.19342, DeLoRA arXiv:2503.18225, GraLoRA arXiv:2505.20355,
HiRA (ICLR 2025), RandLoRA arXiv:2502.00987, SHiRA arXiv:2406.13175, VB-LoRA arXiv:2405.15179, RoAd arXiv:2409.00119, FourierFT arXiv:2405.03003.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.model.adapter_forms import QUIET, Dense, Fault, Kind, Roles, Thin, matrices, need, number, patterned, whole_number
from surgery.model.checkpoint_headers import TensorHeader
from surgery.model.weights import Apply

DENSE = "kinds/adapter_dense"
"""Where the functions of these kinds are, for the resolver of functions."""

ADDED = ("block_sum", "block_repeated", "circulant", "granular", "random_bases", "elements", "frequencies")
"""Forms that add something which does not depend on the weight."""


def _changed(
    path: str, form: str, headers: list[TensorHeader], out: int, inp: int, params: tuple[tuple[str, Any], ...] = (), bias: bool = False
) -> Dense:
    loads = tuple(h.load() for h in headers)
    return Dense(
        path, f"{DENSE}:changed", loads, (("form", form), *params), "in", inp, out=out, bias=f"{DENSE}:changed_bias" if bias else "",
        adds=form in ADDED,
    )  # fmt: skip


def _made(path: str, form: str, headers: list[TensorHeader], rank: int, out: int, inp: int, params: tuple[tuple[str, Any], ...]) -> Thin:
    loads = tuple(h.load() for h in headers)
    a, b = (Apply(shape, "float32", f"{DENSE}:{form}", loads, params, i) for i, shape in enumerate(((rank, inp), (out, rank))))
    return Thin(a, b, rank, 1.0)


def _shaped(path: str, fine: bool, headers: list[TensorHeader], fault: Fault) -> None:
    if not fine:
        raise fault(f"`{path}` has tensors of the shapes {', '.join(str(list(h.shape)) for h in headers)}, which do not go together")


def _boft(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    turns, scale = need(path, roles, ("boft_R", "boft_s"), fault)
    fine = (
        len(turns.shape) == 4
        and turns.shape[2] == turns.shape[3]
        and len(scale.shape) == 2
        and scale.shape[1] == 1
        and 0 not in turns.shape
    )
    _shaped(path, fine, [turns, scale], fault)
    factors, blocks, size, _ = turns.shape
    if factors > 1 and (blocks % 2 ** (factors - 1) or size % 2):
        raise fault(f"`{path}` has {factors} butterfly factors for {blocks} blocks of {size}")
    return _changed(path, "butterfly", [turns, scale], scale.shape[0], blocks * size)


def _hra(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (u,) = need(path, roles, ("hra_u",), fault)
    matrices(path, [u], fault)
    return _changed(path, "reflected", [u], 0, u.shape[0], (("orthogonal", bool(config.get("apply_GS"))),))


def _miss(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (block,) = need(path, roles, ("miss_block",), fault)
    start = str(config.get("init_weights", True)).lower()
    rank = int(number(config, "r", 64, fault))
    if rank not in (block.shape[1:2] if start == "bat" else block.shape[:1]):
        raise fault(f"`{block.key}` is {list(block.shape)}, and its config says blocks of {rank}", "correct `r`")
    if start == "bat":
        _shaped(path, len(block.shape) == 3 and block.shape[1] == block.shape[2] and 0 not in block.shape, [block], fault)
        return _changed(path, "block_product", [block], block.shape[0] * block.shape[1], 0, (("multiple", block.shape[1]),))
    matrices(path, [block], fault)
    if start == "mini":
        return _changed(path, "block_repeated", [block], 0, 0, (("repeats", block.shape[1]),))
    return _changed(path, "block_sum", [block], block.shape[1], 0)


def _c3a(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (kernel,) = need(path, roles, ("c3a_kernel",), fault)
    _shaped(path, len(kernel.shape) == 3 and 0 not in kernel.shape, [kernel], fault)
    m, n, b = kernel.shape
    return _changed(path, "circulant", [kernel], m * b, n * b)


def _delora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    found = need(path, roles, ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), fault)
    a, b, strength, norm = found
    fine = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and strength.shape == (1,) and norm.shape == (a.shape[1],)
    _shaped(path, fine and 0 not in a.shape, found, fault)
    return _made(path, "delora", found, a.shape[0], b.shape[0], a.shape[1], ())


def _gralora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    a, b = need(path, roles, ("gralora_A", "gralora_B"), fault)
    fine = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] and 0 not in (*a.shape, *b.shape)
    _shaped(path, fine and a.shape[2] % a.shape[0] == 0, [a, b], fault)
    blocks, rows, rank = a.shape
    general = ("gralora_A_general", "gralora_B_general")
    hybrid = need(path, roles, general, fault) if config.get("hybrid_r") or any(n in roles for n in general) else []
    matrices(path, hybrid, fault)
    more = hybrid[0].shape[0] if hybrid else 0
    if hybrid and (hybrid[0].shape != (more, blocks * rows) or hybrid[1].shape != (blocks * b.shape[2], more)):
        _shaped(path, False, hybrid, fault)
    scale = number(config, "alpha", 64, fault) / (rank + more)
    return _changed(path, "granular", [a, b, *hybrid], blocks * b.shape[2], blocks * rows, (("scale", scale),))


def _hira(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    a, b = need(path, roles, ("hira_A", "hira_B"), fault)
    matrices(path, [a, b], fault)
    _shaped(path, a.shape[0] == b.shape[1], [a, b], fault)
    return _changed(path, "hadamard", [a, b], b.shape[0], a.shape[1])


def _randlora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    strength, gain = need(path, roles, ("randlora_lambda", "randlora_gamma"), fault)
    bases = [roles.get(n) or shared.get(n) for n in ("randlora_A", "randlora_B")]
    first, second = bases
    if first is None or second is None:
        raise fault(
            "the random bases of the adapter are not in its folder (`save_projection = false`)", "save it with `save_projection = True`"
        )
    found = [strength, gain, *need(path, {BASES[0]: first, BASES[1]: second}, BASES, fault)]
    fine = len(strength.shape) == len(gain.shape) == 2 and len(first.shape) == len(second.shape) == 3 and strength.shape[1] == gain.shape[0]
    _shaped(path, fine and first.shape[0] == second.shape[2] == strength.shape[0] and strength.shape[1] <= second.shape[1], found, fault)
    scale = number(config, "randlora_alpha", 640, fault) / strength.shape[0]
    smaller = gain.shape[1]
    return _changed(path, "random_bases", found, 0, 0, (("scale", scale), ("smaller", smaller), ("larger", second.shape[0])))


def _shira(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    values, places = need(path, roles, ("shira_weight", "shira_indices"), fault)
    _shaped(path, len(values.shape) == 1 and places.shape == (2, values.shape[0]), [values, places], fault)
    return _changed(path, "elements", [values, places], 0, 0)


def _vblora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    if any(r.endswith(("_topk_indices", "_topk_weights")) for r in roles):
        raise fault("it holds the mixtures of its vectors only (`save_only_topk_weights`)", "save it without `save_only_topk_weights`")
    first, second = need(path, roles, ("vblora_logits_A", "vblora_logits_B"), fault)
    bank = shared.get("vblora_vector_bank")
    if bank is None:
        raise fault("its bank of vectors is not in the folder")
    found = [first, second, *need(path, shared, ("vblora_vector_bank",), fault)]
    fine = len(first.shape) == len(second.shape) == 3 and len(bank.shape) == 2 and first.shape[0] == second.shape[1]
    _shaped(path, fine and first.shape[2] == second.shape[2] == bank.shape[0] and 0 not in first.shape, found, fault)
    top, width, rank = int(number(config, "topk", 2, fault)), bank.shape[1], first.shape[0]
    if not 0 < top <= bank.shape[0]:
        raise fault(f"`topk` is {top}, and there are {bank.shape[0]} vectors", "correct the config of the adapter")
    return _made(path, "vblora", found, rank, second.shape[0] * width, first.shape[1] * width, (("top", top),))


def _road(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    angle, stretch = need(path, roles, ("road_theta", "road_alpha"), fault)
    kind, group = str(config.get("variant", "road_1")), int(number(config, "group_size", 64, fault))
    times = {"road_1": 2, "road_2": 1, "road_4": 0.5}.get(kind)
    if times is None:
        raise fault(f"`variant` is {kind!r}", "correct the config of the adapter")
    out = int(angle.shape[0] * times) if angle.shape else 0
    _shaped(
        path,
        len(angle.shape) == 1 and angle.shape == stretch.shape and group > 1 and group % 2 == 0 and out % group == 0 < out,
        [angle, stretch],
        fault,
    )
    return _changed(path, "turned_outputs", [angle, stretch], out, 0, (("kind", kind), ("group", group)), bias=True)


def _fourier(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (spectrum,) = need(path, roles, ("fourierft_spectrum",), fault)
    _shaped(path, len(spectrum.shape) == 1 and 0 not in spectrum.shape, [spectrum], fault)
    said = patterned(config, "n_frequency_pattern", path, number(config, "n_frequency", 1000, fault))
    if said != spectrum.shape[0]:
        raise fault(f"`{spectrum.key}` has {spectrum.shape[0]} frequencies, and its config says {said:g}", "correct `n_frequency`")
    params = (
        ("scale", number(config, "scaling", 150.0, fault)),
        ("places", whole_number(config, "random_loc_seed", 777, fault)),
        ("count", spectrum.shape[0]),
    )
    return _changed(path, "frequencies", [spectrum], 0, 0, params)


def _kind(name: str, roles: tuple[str, ...], fields: str, read: Any, **more: Any) -> Kind:
    return Kind(name, {r: r for r in roles}, QUIET | set(fields.split()), read, **more)


def _none(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    raise fault(f"`{path}` has tensors that no folder of this kind has")


BASES = ("randlora_A", "randlora_B")

DENSE_KINDS: Mapping[str, Kind] = {
    "BOFT": _kind("BOFT", ("boft_R", "boft_s"), "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout", _boft),
    "HRA": _kind("HRA", ("hra_u",), "apply_GS", _hra),
    "MISS": _kind("MiSS", ("miss_block",), "miss_dropout mini_r", _miss),
    "C3A": _kind("C3A", ("c3a_kernel",), "block_size block_size_pattern", _c3a),
    "DELORA": _kind("DeLoRA", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), "delora_lambda lambda_pattern rank_pattern", _delora),
    "GRALORA": _kind(
        "GraLoRA", ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), "alpha hybrid_r gralora_k gralora_dropout", _gralora
    ),
    "HIRA": _kind("HiRA", ("hira_A", "hira_B"), "hira_dropout rank_pattern", _hira, refused={"hira_embedding": "factors of an embedding"}),
    "RANDLORA": _kind(
        "RandLoRA", ("randlora_lambda", "randlora_gamma", *BASES), "projection_prng_key save_projection sparse very_sparse randlora_dropout randlora_alpha",
        _randlora, shared=frozenset(BASES),
    ),
    "SHIRA": _kind("SHiRA", ("shira_weight", "shira_indices"), "mask_type random_seed", _shira),
    "VBLORA": _kind(
        "VB-LoRA", ("vblora_logits_A", "vblora_logits_B", "vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices", "vblora_logits_A_topk_weights",
                    "vblora_logits_B_topk_weights"),
        "num_vectors vector_length topk save_only_topk_weights vblora_dropout init_vector_bank_bound init_logits_std", _vblora,
        shared=frozenset({"vblora_vector_bank"}),
    ),
    "ROAD": _kind("RoAd", ("road_theta", "road_alpha"), "variant group_size", _road),
    "LN_TUNING": _kind("LN tuning", (), "", _none),
    "TRAINABLE_TOKENS": _kind("trainable tokens", (), "token_indices", _none),
    "FOURIERFT": _kind("FourierFT", ("fourierft_spectrum",), "n_frequency scaling random_loc_seed n_frequency_pattern", _fourier),
}  # fmt: skip
"""The kinds by ``peft_type``."""
