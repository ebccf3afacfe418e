"""Adapter files of further kinds, beside those of :mod:`adapter_forms` and :mod:`adapter_dense`.

===========  ====================================================  ====================================================================
PVeRA        ``pvera_lambda_b``, ``_d``, shared projections        VeRA's factors, of whose inner gains the first half is the mean
Uni-LoRA     ``unilora_indices_A``, ``_scales_A``, ..., a vector   factors whose entries are those of one vector
TinyLoRA     ``tinylora_A``, ``_B``, ``_P``, shared vectors        ``B (sum_i v_i P_i) A``
Poly         ``poly_lora_A``, ``_B``, ``poly_router``              the factors of one task
GLoRA        ``glora_A`` to ``glora_E``                            ``W + W A + B`` and ``b + b D + E + W C``
BEFT         ``beft_bias``                                         a bias beside that of the layer
DEFT         ``deft_P``, ``deft_R``                                a subspace of the outputs is taken out, and another map put there
Super-Tuning ``supertuning_values``, ``_indices``, thin factors    plus single elements, plus thin factors
PEANuT       ``peanut_A``, ``_encoders``, ``_decoders``, ``_B``    plus a small network of the weight's columns
OSF          ``osf_svd_params``                                    other terms in the place of the smallest singular values
FRoD         ``frod_lambda_l``, ``_s_values``, shared bases        a weight in a basis that layers share
WaveFT       ``waveft_spectrum``                                   plus the inverse wavelet transform of a few coefficients
===========  ====================================================  ====================================================================

Sources: PVeRA arXiv:2512.07703, Uni-LoRA arXiv:2506.00799, TinyLoRA arXiv:2602.04118, Poly arXiv:2202.13914, GLoRA arXiv:2306.07967, PEANuT arXiv:2410.01870,
OSF arXiv:2504.07097, FRoD doi:10.1609/aaai.v40i31.39813, WaveFT arXiv:2505.12532; names and scales are those of peft's folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.model.adapter_forms import (
    FUNCTIONS,
    QUIET,
    TASK,
    Dense,
    Fault,
    Kind,
    Roles,
    Thin,
    matrices,
    need,
    number,
    patterned,
    projections,
    whole_number,
)
from surgery.model.checkpoint_headers import TensorHeader
from surgery.model.weights import Apply, Expr, select

MORE = "kinds/adapter_more"
"""Where the functions of these kinds are, for the resolver of functions."""

DEPTH = 32
"""How many layers of a PEANuT's network have names here."""

ACTIVATIONS = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "linear", "relu6", "leaky_relu", "mish", "relu2")
FAMILIES = tuple(f"{name}{n}" for name, span in (("db", (1, 11)), ("sym", (2, 11)), ("coif", (1, 4))) for n in range(*span))


def _changed(path: str, form: str, headers: list[TensorHeader], out: int, inp: int, adds: bool = False, **params: Any) -> Dense:
    loads = tuple(h.load() for h in headers)
    return Dense(path, f"{MORE}:changed", loads, (("form", form), *params.items()), "in", inp, out=out, adds=adds)


def _made(
    form: str, args: tuple[Expr, ...], rank: int, out: int, inp: int, scale: float = 1.0, shared: bool = False, **params: Any
) -> Thin:
    name = form if ":" in form else f"{MORE}:{form}"
    a, b = (Apply(shape, "float32", name, args, tuple(params.items()), i) for i, shape in enumerate(((rank, inp), (out, rank))))
    return Thin(a, b, rank, scale, shared)


def _fits(path: str, fine: bool, headers: list[TensorHeader], fault: Fault) -> None:
    if not fine:
        raise fault(f"`{path}` has tensors of the shapes {', '.join(str(list(h.shape)) for h in headers)}, which do not go together")


# ------------------------------------------------------------------ thin factors


def _pvera(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    b, d = need(path, roles, ("pvera_lambda_b", "pvera_lambda_d"), fault)
    first, second = projections(path, shared, "pvera", fault)
    fine = len(b.shape) == len(d.shape) == 1 and d.shape[0] == first.shape[0] == 2 * second.shape[1] and b.shape[0] <= second.shape[0]
    _fits(path, fine, [b, d, first, second], fault)
    rank = second.shape[1]
    half = ((0, rank),)
    args = (b.load(), select(d.load(), 0, half), select(first.load(), 0, half), second.load())
    return _made(f"{FUNCTIONS}:vera", args, rank, b.shape[0], first.shape[1], shared=True)


def _unilora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    names = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    found = need(path, roles, names, fault)
    if "unilora_theta_d" not in shared:
        raise fault("its vector is not in the folder")
    (entries,) = need(path, shared, ("unilora_theta_d",), fault)
    matrices(path, found, fault)
    first, second = found[0].shape, found[1].shape
    fine = len(entries.shape) == 1 and found[2].shape == first and found[3].shape == second and first[0] == second[1]
    _fits(path, fine, [entries, *found], fault)
    return _made("indexed", tuple(h.load() for h in (entries, *found)), first[0], second[0], first[1])


def _tiny(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    if not config.get("save_projection", True) or "tinylora_P" not in roles:
        raise fault("its random projections are not in the folder (`save_projection = false`)", "save it with `save_projection = True`")
    a, b, mixed = found = need(path, roles, ("tinylora_A", "tinylora_B", "tinylora_P"), fault)
    matrices(path, [a, b], fault)
    vectors = need(path, shared, tuple(sorted((n for n in shared if n.startswith("tinylora_v.")), key=_number)), fault)
    if not vectors:
        raise fault("its trained vectors are not in the folder")
    rank = a.shape[0]
    if [_number(v.key.removesuffix(".weight")) for v in vectors] != list(range(len(vectors))):
        raise fault(f"its vectors are not numbered from 0: {', '.join(v.key for v in vectors[:4])}")
    fine = b.shape[1] == rank and len(mixed.shape) == 3 and mixed.shape[1:] == (rank, rank)
    _fits(path, fine and all(v.shape == mixed.shape[:1] for v in vectors), [*found, *vectors], fault)
    args = tuple(h.load() for h in (*found, *vectors))
    return _made("tiny", args, rank, b.shape[0], a.shape[1], which=0 if len(vectors) == 1 else -1)


def _number(name: str) -> int:
    tail = name.rpartition(".")[2]
    return int(tail) if tail.isdigit() else -1


def _poly(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Thin:
    a, b, logits = found = need(path, roles, ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"), fault)
    fine = len(a.shape) == len(b.shape) == 4 and a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[2] and len(logits.shape) == 2
    _fits(path, fine and logits.shape[1] == a.shape[0] * a.shape[1], found, fault)
    task, rank = int(number(config, TASK, 0, fault)), a.shape[3]
    if not 0 <= task < logits.shape[0]:
        raise fault(f"it knows {logits.shape[0]} tasks, and number {task} is asked for", "tasks are counted from 0")
    said = number(config, "r", 8, fault)
    if said != rank or number(config, "n_tasks", 1, fault) != logits.shape[0]:
        raise fault(
            f"`{path}` has rank {rank} and {logits.shape[0]} tasks, and its config says something else", "correct `r` and `n_tasks`"
        )
    if (config.get("n_splits", 1), config.get("n_skills", 4)) != a.shape[:2]:
        raise fault(
            f"`{path}` has {a.shape[0]} splits of {a.shape[1]} skills, and its config says something else",
            "correct `n_splits` and `n_skills`",
        )
    return _made("routed", tuple(h.load() for h in found), rank, b.shape[0] * b.shape[3], a.shape[0] * a.shape[2], 1.0 / rank, task=task)


# ------------------------------------------------------------------ whole weights


def _glora(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    forms: dict[str, list[TensorHeader]] = {}
    for letter in "ABCDE":
        mine = {r.rpartition(".")[2] for r in roles if r.startswith(f"glora_{letter}.")}
        if mine not in ({"Xd", "Xu"}, {"X"}, {"zeros"}):
            raise fault(f"`{path}` has no `glora_{letter}` of a form that is known")
        if mine != {"zeros"}:
            forms[letter] = need(path, roles, tuple(f"glora_{letter}.{x}" for x in sorted(mine)), fault)
    said = {"lora": 2, "vector": 1, "constant": 1}
    for letters, name, default in (("AB", "config_A_B", "lora"), ("C", "config_C", "lora"), ("DE", "config_D_E", "constant")):
        for letter in letters:
            here = forms.get(letter, [])
            word = config.get(name, default)
            kind = "none" if not here else "lora" if len(here) == 2 else "constant" if here[0].shape == (1,) else "vector"
            if here and (said.get(str(word)) != len(here) or kind != word):
                raise fault(f"`{path}` has a `glora_{letter}` of {kind} form, and its config says {word!r}", f"correct `{name}`")
            if not here and letter in "AB" and word in said:
                raise fault(f"`{path}` has no `glora_{letter}`, and its config says {word!r}", f"correct `{name}`")
    headers = [h for found in forms.values() for h in found]
    out, inp = _glora_sizes(path, forms, headers, fault)
    counts = {letter: len(forms.get(letter, [])) for letter in "ABCDE"}
    weight = [*forms.get("A", []), *forms.get("B", [])]
    bias = [h for letter in "CDE" for h in forms.get(letter, [])]
    return Dense(
        path, f"{MORE}:changed" if weight else "", tuple(h.load() for h in weight),
        (("form", "glora"), ("forms", (counts["A"], counts["B"]))) if weight else (), "in", inp, out=out,
        bias=f"{MORE}:glora_bias" if bias else "", reads_weight=True, bias_tensors=tuple(h.load() for h in bias),
        bias_params=(("forms", (counts["C"], counts["D"], counts["E"])),),
    )  # fmt: skip


def _glora_sizes(path: str, forms: Mapping[str, list[TensorHeader]], headers: list[TensorHeader], fault: Fault) -> tuple[int, int]:
    """Outputs and inputs of the layer, 0 where nothing says them."""
    outs: set[int] = set()
    ins: set[int] = set()
    fine = True
    for letter, found in forms.items():
        shapes = [h.shape for h in found]
        if len(found) == 2:
            fine &= len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][0] and (letter != "C" or shapes[1][1] == 1)
            (ins if letter == "C" else outs).add(shapes[0][0])
            ins |= {shapes[1][-1]} if letter in "AB" else set()
        elif shapes[0] != (1,):
            fine &= len(shapes[0]) == (1 if letter in "DE" else 2) and (letter in "DE" or shapes[0][1] == 1)
            (ins if letter == "C" else outs).add(shapes[0][0])
    _fits(path, fine and len(outs) < 2 and len(ins) < 2, headers, fault)
    return next(iter(outs), 0), next(iter(ins), 0)


def _beft(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (shift,) = need(path, roles, ("beft_bias",), fault)
    _fits(path, len(shift.shape) == 2 and shift.shape[0] == 1, [shift], fault)
    return Dense(
        path,
        "",
        (),
        (),
        "in",
        0,
        out=shift.shape[1],
        bias=f"{MORE}:moved_bias",
        bias_tensors=(shift.load(),),
        adds=True,
        reads_weight=False,
    )


def _deft(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    alone = bool(config.get("para"))
    found = need(path, roles, ("deft_P",) if alone else ("deft_P", "deft_R"), fault)
    matrices(path, found, fault)
    if alone and "deft_R" in roles:
        raise fault(f"`{path}` has a `deft_R`, and its config says that there is none (`para`)", "correct `para`")
    how = config.get("decomposition_method", "relu")
    if how not in ("relu", "qr"):
        raise fault(f"`decomposition_method` is {how!r}", "correct the config of the adapter")
    rank = found[0].shape[1]
    said = min(int(number(config, "r", 8, fault)), found[0].shape[0])
    _fits(path, (alone or found[1].shape[0] == rank) and rank <= found[0].shape[0], found, fault)
    if said != rank:
        raise fault(f"`{path}` has rank {rank}, and its config says {said}", "correct `r`")
    scale = number(config, "alpha", 0, fault) / rank if config.get("alpha") else 1.0
    return _changed(path, "projected", found, found[0].shape[0], 0 if alone else found[1].shape[1], decomposition=how, scale=scale)


def _supertuning(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    if "supertuning_indices" not in roles or not config.get("save_precomputed_indices", True):
        raise fault(
            "the places of its values are not in its folder (`save_precomputed_indices = false`)",
            "save it with `save_precomputed_indices = True`",
        )
    found = need(path, roles, ("supertuning_values", "supertuning_indices"), fault)
    _fits(path, len(found[0].shape) == 1 and found[1].shape == found[0].shape, found, fault)
    factors = need(path, roles, ("supertuning_lora_A", "supertuning_lora_B"), fault) if config.get("r") is not None else []
    matrices(path, factors, fault)
    if not factors and "supertuning_lora_A" in roles:
        raise fault(f"`{path}` has thin factors, and its config has no `r`", "correct `r`")
    rank = factors[0].shape[0] if factors else 1
    if factors and (factors[1].shape[1] != rank or number(config, "r", 0, fault) != rank):
        raise fault(f"`{path}` has thin factors of rank {rank}, and its config says {config.get('r')}", "correct `r`")
    scale = number(config, "lora_alpha", 0, fault) / rank if factors else 0.0
    out, inp = (factors[1].shape[0], factors[0].shape[1]) if factors else (0, 0)
    return _changed(path, "entries", [*found, *factors], out, inp, adds=True, scale=scale)


def _peanut(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    depth = int(number(config, "depth", 0, fault))
    layers = [f"peanut_{side}.{i}" for side in ("encoders", "decoders") for i in range(depth)]
    found = need(path, roles, ("peanut_A", "peanut_B", *layers), fault)
    matrices(path, found, fault)
    if len(roles) != len(found):
        raise fault(f"`{path}` has more layers than its config says ({depth})", "correct `depth`")
    rank, out = found[0].shape
    _fits(path, found[1].shape == (out, rank) and all(h.shape == (rank, rank) for h in found[2:]), found, fault)
    act = config.get("act_fn", "relu")
    if act not in ACTIVATIONS:
        raise fault(f"`act_fn` is {act!r}, a function that is not known here", f"known are {', '.join(ACTIVATIONS)}")
    if number(config, "r", 32, fault) != rank:
        raise fault(f"`{path}` has rank {rank}, and its config says {config.get('r')}", "correct `r`")
    return _changed(path, "network", found, out, 0, act=act, scale=number(config, "scaling", 1.0, fault))


def _osf(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    u, s, v = found = need(path, roles, tuple(f"osf_svd_params.{n}" for n in ("U_low", "S_low", "V_low")), fault)
    matrices(path, [u, v], fault)
    count = s.shape[0]
    _fits(path, len(s.shape) == 1 and u.shape[1] == v.shape[0] == count <= min(u.shape[0], v.shape[1]), found, fault)
    least = min(u.shape[0], v.shape[1])
    said: Any = config.get("effective_rank")
    for pattern, value in (config.get("rank_pattern") or {}).items() if isinstance(config.get("rank_pattern"), Mapping) else ():
        if patterned({"p": {pattern: 1.0}}, "p", path, 0.0):
            said = value
            break
    top = least // 2 if said is None else int(least * said) if isinstance(said, float) and 0 < said <= 1 else said
    if isinstance(top, bool) or not isinstance(top, int | float) or min(least, int(top)) != least - count:
        raise fault(
            f"`{path}` replaces {count} of {least} singular values, and its config keeps {said}",
            "correct `effective_rank` or `rank_pattern`",
        )
    return _changed(path, "low_spectrum", found, u.shape[0], v.shape[1])


def _frod(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    scales, values = need(path, roles, ("frod_lambda_l", "frod_lambda_s_values"), fault)
    sort = _sort_of(path)
    names = (f"frod_V.{sort}", f"frod_s_indices.{sort}")
    if any(n not in shared for n in names) or not config.get("save_projection", True):
        raise fault(
            "the shared bases of the adapter are not in its folder (`save_projection = false`)", "save it with `save_projection = True`"
        )
    basis, places = need(path, shared, names, fault)
    size = basis.shape[0] if basis.shape else 0
    fine = basis.shape == (size, size) and places.shape == (2, values.shape[0]) and scales.shape == (size,) and len(values.shape) == 1
    _fits(path, fine, [basis, places, values, scales], fault)
    alpha = number(config, "regularization_alpha", 1e-3, fault)
    return _changed(path, "shared_basis", [basis, places, values, scales], 0, size, alpha=alpha)


def _sort_of(path: str) -> str:
    """What layers of different blocks have in common: the end of their paths."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _waveft(path: str, roles: Roles, config: Mapping[str, Any], shared: Roles, fault: Fault) -> Dense:
    (spectrum,) = need(path, roles, ("waveft_spectrum",), fault)
    _fits(path, len(spectrum.shape) == 1, [spectrum], fault)
    said = patterned(config, "n_frequency_pattern", path, number(config, "n_frequency", 2592, fault))
    if said != spectrum.shape[0] and not config.get("proportional_parameters"):
        raise fault(f"`{spectrum.key}` has {spectrum.shape[0]} coefficients, and its config says {said:g}", "correct `n_frequency`")
    family = config.get("wavelet_family", "db1") if config.get("use_idwt", True) else ""
    if family not in FAMILIES and (config.get("use_idwt", True) or family):
        why = (
            "peft's filter of that name is no wavelet (it is not orthogonal)"
            if family in ("coif4", "coif5")
            else "a family that is not known here"
        )
        raise fault(f"`wavelet_family` is {family!r}: {why}", f"known are {', '.join(FAMILIES)}")
    params = {
        "family": family, "scale": number(config, "scaling", 25.0, fault), "places": whole_number(config, "random_loc_seed", 777, fault),
        "count": spectrum.shape[0],
    }  # fmt: skip
    return _changed(path, "waves", [spectrum], 0, 0, adds=True, **params)


def _kind(name: str, roles: tuple[str, ...], fields: str, read: Any, **more: Any) -> Kind:
    return Kind(name, {r: r for r in roles}, QUIET | set(fields.split()), read, **more)


def _sampled(config: Mapping[str, Any]) -> str:
    return "its factors are drawn at random for every call (`sample_at_inference`)" if config.get("sample_at_inference") else ""


def _unsaved(config: Mapping[str, Any]) -> str:
    if config.get("save_indices"):
        return ""
    return "its factors are drawn at random in the order in which peft visits the layers, and the folder does not hold them (`save_indices = false`)"


def _mixed(config: Mapping[str, Any]) -> str:
    return (
        ""
        if config.get("poly_type", "poly") == "poly"
        else f"its mixture is of a sort that is not known (`poly_type` {config.get('poly_type')!r})"
    )


MORE_KINDS: Mapping[str, Kind] = {
    "PVERA": _kind(
        "PVeRA", ("pvera_lambda_b", "pvera_lambda_d"), "projection_prng_key save_projection pvera_dropout d_initial sample_at_inference generator_seed",
        _pvera, shared=frozenset({"pvera_A", "pvera_B"}), against=_sampled,
    ),
    "UNILORA": _kind(
        "Uni-LoRA", ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
        "proj_seed theta_d_length unilora_dropout init_theta_d_bound save_indices", _unilora, shared=frozenset({"unilora_theta_d"}), against=_unsaved,
    ),
    "TINYLORA": _kind(
        "TinyLoRA", ("tinylora_A", "tinylora_B", "tinylora_P"), "u weight_tying projection_seed save_projection init_v_bound tinylora_dropout", _tiny,
        shared=frozenset({"tinylora_v"}), parted=True,
    ),
    "POLY": _kind(
        "Poly", ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"), "poly_type n_tasks n_skills n_splits", _poly, against=_mixed,
        tasks="n_tasks",
    ),
    "GLORA": _kind(
        "GLoRA", tuple(f"glora_{x}.{y}" for x in "ABCDE" for y in ("Xd", "Xu", "X", "zeros")), "config_A_B config_C config_D_E", _glora
    ),
    "BEFT": _kind("BEFT", ("beft_bias",), "", _beft),
    "DEFT": _kind("DEFT", ("deft_P", "deft_R"), "alpha decomposition_method deft_dropout init_scale para", _deft),
    "SUPERTUNING": _kind(
        "Super-Tuning", ("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"),
        "sparsity select_top lora_alpha lora_dropout save_precomputed_indices", _supertuning,
    ),
    "PEANUT": _kind(
        "PEANuT", ("peanut_A", "peanut_B", *(f"peanut_{s}.{i}" for s in ("encoders", "decoders") for i in range(DEPTH))), "depth act_fn scaling", _peanut
    ),
    "OSF": _kind("OSF", tuple(f"osf_svd_params.{n}" for n in ("U_low", "S_low", "V_low")), "effective_rank rank_pattern", _osf),
    "FROD": _kind(
        "FRoD", ("frod_lambda_l", "frod_lambda_s_values"),
        "projection_prng_key save_projection frod_dropout sparse_rate regularization_alpha progressbar runtime_offload_base_weight", _frod,
        shared=frozenset({"frod_V", "frod_s_indices", "frod_s_size"}), parted=True,
    ),
    "WAVEFT": _kind(
        "WaveFT", ("waveft_spectrum",), "n_frequency scaling wavelet_family use_idwt random_loc_seed n_frequency_pattern proportional_parameters", _waveft
    ),
}  # fmt: skip
"""The kinds by ``peft_type``."""
