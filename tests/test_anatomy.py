"""Roles, head counts, widths and layer counts of every family against its config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from surgery.core.site import Site
from surgery.model.anatomy import find_anatomy
from surgery.model.program import Program
from tests.anatomy_support import sites_of, zoo_program
from tests.zoo import ZOO


@dataclass(frozen=True)
class Tower:
    """What a config says of one stack."""

    stack: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    causal: bool = False
    cross: bool = False
    gated: bool = False
    activation: str = "gelu"
    norm: str = "pre"


def towers(family: str) -> list[Tower]:
    c = ZOO[family].make_config()
    if family in ("bert", "roberta", "deberta-v2"):
        w, h = c.hidden_size, c.num_attention_heads
        return [Tower("layers", c.num_hidden_layers, w, h, h, w // h, c.intermediate_size, norm="post")]
    if family == "albert":  # one group of parameters, called by every layer
        w, h = c.hidden_size, c.num_attention_heads
        return [
            Tower(
                "layers", c.num_hidden_groups * c.inner_group_num, w, h, h, w // h, c.intermediate_size, activation="gelu_tanh", norm="post"
            )
        ]
    if family == "distilbert":
        return [Tower("layers", c.n_layers, c.dim, c.n_heads, c.n_heads, c.dim // c.n_heads, c.hidden_dim, norm="post")]
    if family == "gpt2":
        return [
            Tower(
                "layers", c.n_layer, c.n_embd, c.n_head, c.n_head, c.n_embd // c.n_head, 4 * c.n_embd, causal=True, activation="gelu_tanh"
            )
        ]
    if family in ("llama", "qwen3", "phi3", "mixtral", "gemma3_text"):
        h = c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // h
        act = "gelu_tanh" if family == "gemma3_text" else "silu"
        return [
            Tower(
                "layers",
                c.num_hidden_layers,
                c.hidden_size,
                h,
                c.num_key_value_heads,
                width,
                c.intermediate_size,
                causal=True,
                gated=True,
                activation=act,
            )
        ]
    if family == "t5":
        common = (c.d_model, c.num_heads, c.num_heads, c.d_kv, c.d_ff)
        return [
            Tower("encoder.layers", c.num_layers, *common, activation="relu"),
            Tower("decoder.layers", c.num_decoder_layers, *common, causal=True, cross=True, activation="relu"),
        ]
    if family in ("bart", "whisper"):
        norm = "post" if family == "bart" else "pre"
        e, d = c.encoder_attention_heads, c.decoder_attention_heads
        return [
            Tower("encoder.layers", c.encoder_layers, c.d_model, e, e, c.d_model // e, c.encoder_ffn_dim, norm=norm),
            Tower(
                "decoder.layers", c.decoder_layers, c.d_model, d, d, c.d_model // d, c.decoder_ffn_dim, causal=True, cross=True, norm=norm
            ),
        ]
    if family in ("vit", "audio-spectrogram-transformer"):
        w, h = c.hidden_size, c.num_attention_heads
        return [Tower("layers", c.num_hidden_layers, w, h, h, w // h, c.intermediate_size)]
    if family == "clip":
        return [
            Tower(f"{name}.layers", p.num_hidden_layers, p.hidden_size, p.num_attention_heads, p.num_attention_heads, p.hidden_size // p.num_attention_heads,
                  p.intermediate_size, causal=name == "text", activation="quick_gelu")
            for name, p in (("vision", c.vision_config), ("text", c.text_config))
        ]  # fmt: skip
    assert family == "swin"
    return [
        Tower(f"stages[{i}].layers", depth, c.embed_dim << i, h, h, (c.embed_dim << i) // h, int(c.mlp_ratio * (c.embed_dim << i)))
        for i, (depth, h) in enumerate(zip(c.depths, c.num_heads, strict=True))
    ]


FAMILIES = ["bert", "roberta", "distilbert", "albert", "deberta-v2", "gpt2", "llama", "qwen3", "gemma3_text", "phi3", "mixtral", "t5", "bart", "whisper",
            "vit", "swin", "clip", "audio-spectrogram-transformer"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_match_the_config(family: str) -> None:
    program = zoo_program(family)
    sites = sites_of(program)
    wanted = towers(family)
    assert [(s.name, s.layers) for s in program.anatomy.stacks] == [(t.stack, t.layers) for t in wanted]
    for tower in wanted:
        for i in range(tower.layers):
            base = f"{tower.stack}[{i}]"
            assert sites[base].is_region and (sites[base].stack, sites[base].layer) == (tower.stack, i)
            _attention(sites, f"{base}.attn", tower, causal=tower.causal)
            assert (f"{base}.cross" in sites) == tower.cross
            if tower.cross:
                _attention(sites, f"{base}.cross", tower, causal=False)
                assert sites[f"{base}.cross"].facts["cross"] is True
            _feed_forward(sites, f"{base}.ffn", tower)
            assert f"{base}.norm[0]" in sites


def _attention(sites: dict[str, Site], role: str, t: Tower, causal: bool) -> None:
    region = sites[role]
    assert region.is_region
    assert (region.heads, region.kv_heads, region.head_dim) == (t.heads, t.kv_heads, t.head_dim)
    assert region.facts["causal"] is causal
    assert region.facts["norm"] == t.norm
    for name, out in (("q", t.heads), ("k", t.kv_heads), ("v", t.kv_heads)):
        assert sites[f"{role}.{name}"].shape == (out * t.head_dim, t.width)
        assert sites[f"{role}.{name}"].weight in region.parameters
    assert sites[f"{role}.o"].shape == (t.width, t.heads * t.head_dim)


def _feed_forward(sites: dict[str, Site], role: str, t: Tower) -> None:
    region = sites[role]
    assert (region.facts["activation"], region.facts["gated"], region.facts["width"]) == (t.activation, t.gated, t.inner)
    experts = region.facts.get("experts")
    stem, front = (f"{role}.experts", (experts,)) if experts else (role, ())
    assert sites[f"{stem}.up"].shape == (*front, t.inner, t.width)
    assert sites[f"{stem}.down"].shape == (*front, t.width, t.inner)
    assert (f"{stem}.gate" in sites) == t.gated


@pytest.mark.parametrize("family", [*FAMILIES, "resnet", "convnext", "wav2vec2-conformer"])
def test_every_parameter_is_accounted_for(family: str) -> None:
    program = zoo_program(family)
    owned = {n for s in program.anatomy.sites if not s.is_region for n in (s.weight, s.bias) if n}
    listed = {u.path for u in program.anatomy.unresolved}
    names = {program.aliases.get(n, n) for n, _ in program.graph.named_parameters(remove_duplicate=False)}
    assert owned | listed == names
    assert not owned & listed
    assert all(u.why for u in program.anatomy.unresolved)
    raw = {n for s in program.anatomy.modules for n in (s.weight, s.bias) if n}
    assert raw == names


UNRESOLVED = {
    "clip": {"logit_scale"},
    "deberta-v2": {"encoder.rel_embeddings.weight"},
    "convnext": {f"encoder.stages.{i}.layers.{j}.layer_scale_parameter" for i in range(2) for j in range(3)},
}


@pytest.mark.parametrize("family", [f for f in [*FAMILIES, "resnet", "convnext"] if f != "wav2vec2-conformer"])
def test_nothing_else_is_left_over(family: str) -> None:
    unread = "no operation of the captured call reads it"
    assert {u.path for u in zoo_program(family).anatomy.unresolved if u.why != unread} == UNRESOLVED.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_places_of_blocks_are_in_one_graph_and_exist(family: str) -> None:
    """What an insertion needs: the block's input, its output before the addition, the residual, the norm behind the addition."""
    program = zoo_program(family)
    for site in program.anatomy.sites:
        if not site.is_region or site.role.endswith(".experts"):
            continue
        assert site.input is not None and site.output is not None, site.role
        places = [p for p in (site.input, site.output, site.residual, site.norm_output) if p is not None]
        assert len({p.graph for p in places}) == 1, site.role
        for place in places:
            program.node(place)
        if site.role.endswith(("attn", "cross", "ffn")):
            assert site.residual is not None, site.role
            output, residual = program.node(site.output), program.node(site.residual)
            joins = [u for u in output.users if "add" in str(u.target)]
            assert joins and any(residual in u.all_input_nodes or _casts(residual) & set(u.all_input_nodes) for u in joins), site.role
            assert (site.norm_output is not None) == (site.facts["norm"] == "post")


def _casts(node: object) -> set[object]:
    return {u for u in node.users if ".to." in str(u.target) or "_to_copy" in str(u.target)}  # type: ignore[attr-defined]


def test_fused_projections_are_slices() -> None:
    gpt2 = sites_of(zoo_program("gpt2"))
    q, k, v = (gpt2[f"layers[1].attn.{r}"] for r in "qkv")
    assert {(s.op, s.weight, s.out_axis, s.in_axis) for s in (q, k, v)} == {("conv1d", "transformer.h.1.attn.c_attn.weight", 1, 0)}
    assert (q.rows, k.rows, v.rows) == (((0, 32),), ((32, 64),), ((64, 96),))
    phi = sites_of(zoo_program("phi3"))
    assert [phi[f"layers[0].attn.{r}"].rows for r in "qkv"] == [((0, 32),), ((32, 48),), ((48, 64),)]
    assert [phi[f"layers[0].ffn.{r}"].rows for r in ("gate", "up")] == [((0, 64),), ((64, 128),)]
    assert phi["layers[0].ffn.gate"].weight == phi["layers[0].ffn.up"].weight


def test_experts_and_router() -> None:
    config = ZOO["mixtral"].make_config()
    sites = sites_of(zoo_program("mixtral"))
    region = sites["layers[2].ffn"]
    assert (region.facts["experts"], region.facts["top_k"]) == (config.num_local_experts, config.num_experts_per_tok)
    router = sites["layers[2].ffn.router"]
    assert router.shape == (config.num_local_experts, config.hidden_size)
    for name in ("up", "gate", "down"):
        assert sites[f"layers[2].ffn.experts.{name}"].op == "experts"
    assert sites["layers[2].ffn.experts.up"].rows and not sites["layers[2].ffn.experts.down"].rows


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("bert", {"embed.tokens", "embed.positions", "embed.types", "embed.norm", "pooler"}),
        ("roberta", {"embed.tokens", "embed.positions", "embed.types", "embed.norm", "pooler"}),
        ("distilbert", {"embed.tokens", "embed.positions", "embed.norm"}),
        ("albert", {"embed.tokens", "embed.positions", "embed.types", "embed.norm", "embed.projection", "pooler"}),
        ("gpt2", {"embed.tokens", "embed.positions", "norm", "head"}),
        ("llama", {"embed.tokens", "norm", "head"}),
        ("phi3", {"embed.tokens", "norm", "head"}),
        ("t5", {"embed.tokens", "encoder.norm", "decoder.norm"}),
        ("bart", {"embed.tokens", "encoder.embed.positions", "decoder.embed.positions", "encoder.embed.norm", "decoder.embed.norm"}),
        ("whisper", {"embed.conv[0]", "embed.conv[1]", "embed.tokens", "encoder.embed.positions", "decoder.embed.positions", "encoder.norm", "decoder.norm"}),
        ("vit", {"embed.patch", "embed.cls", "embed.positions", "norm", "pooler"}),
        ("swin", {"embed.patch", "embed.norm", "stages[0].downsample", "stages[0].downsample.norm", "norm"}),
        ("clip", {"embed.patch", "embed.cls", "embed.tokens", "embed.norm", "vision.embed.positions", "text.embed.positions", "vision.norm", "text.norm",
                  "vision.head", "text.head"}),
        ("resnet", {"embed.conv[0]", "embed.norm"}),
    ],
)  # fmt: skip
def test_parts_outside_of_the_layers(family: str, roles: set[str]) -> None:
    assert {s.role for s in zoo_program(family).anatomy.sites if s.layer is None} == roles


def test_tied_head_and_causal_facts() -> None:
    sites = sites_of(zoo_program("gpt2"))
    assert sites["head"].tied_to == "embed.tokens" and sites["head"].weight == sites["embed.tokens"].weight
    assert sites["head"].path == "lm_head" and sites["embed.tokens"].path == "transformer.wte"


def test_relative_bias_tables_and_head_norms() -> None:
    t5 = sites_of(zoo_program("t5"))
    assert t5["encoder.layers[0].attn.bias"].weight == "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert "encoder.layers[1].attn.bias" not in t5  # one table for the whole stack
    swin = sites_of(zoo_program("swin"))
    assert all(f"stages[1].layers[{i}].attn.bias" in swin for i in range(4))
    qwen = sites_of(zoo_program("qwen3"))
    assert qwen["layers[0].attn.q_norm"].shape == (8,) and qwen["layers[0].attn.k_norm"].op == "norm"


def test_shared_layer_has_one_site_and_all_calls() -> None:
    config = ZOO["albert"].make_config()
    sites = sites_of(zoo_program("albert"))
    assert sites["layers[0]"].facts["calls"] == config.num_hidden_layers


def test_convolutional_stages() -> None:
    config = ZOO["resnet"].make_config()
    program = zoo_program("resnet")
    sites = sites_of(program)
    assert [(s.name, s.layers) for s in program.anatomy.stacks] == [(f"stages[{i}].layers", d) for i, d in enumerate(config.depths)]
    for i, width in enumerate(config.hidden_sizes):
        convs = [sites[f"stages[{i}].layers[0].conv[{j}]"] for j in range(3)]
        assert convs[-1].shape[0] == width and convs[1].shape == (width // 4, width // 4, 3, 3)
        assert sites[f"stages[{i}].layers[0].shortcut"].shape[0] == width
        assert f"stages[{i}].layers[1].shortcut" not in sites
        assert all(sites[f"stages[{i}].layers[0].norm[{j}]"].facts["kind"] == "batch" for j in range(4))
    assert sites["stages[1].layers[0].conv[1]"].facts["stride"] == (2, 2)


def test_sites_are_in_model_order_and_the_same_every_time() -> None:
    program: Program = zoo_program("bart")
    roles = [s.role for s in program.anatomy.sites]
    assert roles.index("encoder.layers[2].ffn.down") < roles.index("decoder.layers[0]") < roles.index("decoder.layers[0].attn.q")
    again = find_anatomy(program)
    assert again == program.anatomy
    assert [dataclasses.asdict(s) for s in again.sites] == [dataclasses.asdict(s) for s in program.anatomy.sites]
