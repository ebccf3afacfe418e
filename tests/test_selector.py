"""Selectors on real anatomies: what they name, and the exact counts and names in their diagnostics."""

from __future__ import annotations

import pytest

from surgery.core import ast
from surgery.core.diagnostics import Diagnostic, SurgeryError
from surgery.core.selector import expand_per_layer, select
from surgery.core.site import Site
from tests.anatomy_support import parsed, zoo_program


def names(text: str, family: str = "bert", created: dict[str, list[Site]] | None = None) -> list[str]:
    return [s.role for s in select(zoo_program(family).anatomy, parsed(text), created or {})]


def fault(text: str, family: str = "bert") -> Diagnostic:
    with pytest.raises(SurgeryError) as caught:
        names(text, family)
    return caught.value.diagnostics[0]


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("layers[*].attn.{q, v}", [f"layers[{i}].attn.{r}" for i in range(3) for r in "qv"]),
        ("layers[-1].ffn.up", ["layers[2].ffn.up"]),
        ("layers[0, 2]", ["layers[0]", "layers[2]"]),
        ("layers[0..2 by 2].attn", ["layers[0].attn", "layers[2].attn"]),
        ("layers[1..].norm[1]", ["layers[1].norm[1]", "layers[2].norm[1]"]),
        ("layers[*].{attn.q, ffn.up}", [f"layers[{i}].{r}" for i in range(3) for r in ("attn.q", "ffn.up")]),
        ("**.o", [f"layers[{i}].attn.o" for i in range(3)]),
        ("layers[0].*", ["layers[0].attn", "layers[0].ffn", "layers[0].norm[0]", "layers[0].norm[1]"]),
        ("embed.{tokens, types}", ["embed.tokens", "embed.types"]),
        ("layers[*].attn.gate?", []),
        ("layers[1, 9].attn?", ["layers[1].attn"]),
        ('"encoder.layer.*.output.dense"', [f"layers[{i}].ffn.down" for i in range(3)]),
        ('"encoder.layer.1"', ["layers[1]"]),
    ],
)
def test_selection(text: str, roles: list[str]) -> None:
    assert names(text) == roles


def test_any_depth_gives_every_parameter_below() -> None:
    sites = select(zoo_program("convnext").anatomy, parsed("stages[0].layers[0].**"))
    owned = {n for s in sites for n in (s.weight, s.bias) if n}
    assert owned == set(next(s for s in zoo_program("convnext").anatomy.sites if s.role == "stages[0].layers[0]").parameters)


def test_raw_path_of_a_fused_module_is_one_site() -> None:
    (site,) = select(zoo_program("gpt2").anatomy, parsed('"transformer.h.0.attn.c_attn"'))
    assert site.role == '"transformer.h.0.attn.c_attn"' and site.rows == () and site.shape == (96, 32)


def test_trunk_name_may_stand_in_front() -> None:
    assert names("text.embed.tokens", "clip") == names("embed.tokens", "clip") == ["embed.tokens"]


def test_an_expert_is_the_set_of_its_parts() -> None:
    parts = [f"layers[0].ffn.experts[2].{p}" for p in ("up", "gate", "down")]
    assert sorted(names("layers[0].ffn.experts[2]", "mixtral")) == sorted(parts)
    assert names("layers[0].ffn.experts[2]", "mixtral") == names("layers[0].ffn.experts[2].{up, gate, down}", "mixtral")
    assert len(names("layers[*].ffn.experts[0, 3]", "mixtral")) == 2 * 3 * len(names("layers[*].ffn", "mixtral"))
    sites = select(zoo_program("mixtral").anatomy, parsed("layers[0].ffn.experts[2]"))
    assert all(s.op == "expert" and s.facts["expert"] == 2 and s.shape[0] == 1 for s in sites)
    assert names("layers[0].ffn.experts", "mixtral") == names("layers[0].ffn.experts[*]", "mixtral"), "all of them are their region"
    assert fault("layers[0].ffn.experts[4]", "mixtral").code == "S0303"


@pytest.mark.parametrize(
    ("text", "message", "help"),
    [
        ("layers[2..1]", "the range `2..1` has nothing in it", "`layers[1..2]` for the layers 1 to 2"),
        ("layers[0, 2..1].attn.q", "the range `2..1` has nothing in it", "`layers[1..2]`"),
        ("layers[-1..0]", "the range `-1..0` (here 2..0) has nothing in it", "`layers[0..2]` for the layers 0 to 2"),
        ("layers[0].norm[1..0]", "the range `1..0` has nothing in it", "`norm[0..1]` for the parts 0 to 1"),
    ],
)
def test_a_range_that_ends_before_it_begins(text: str, message: str, help: str) -> None:
    found = fault(text)
    assert found.code == "S0314" and found.message.startswith(message) and help in found.help[0]
    assert names(text + "?") == names(text.replace(", 2..1", "") + "?" if ", " in text else "layers[*].attn.gate?")
    assert names("layers[-3..2]") == ["layers[0]", "layers[1]", "layers[2]"]


def test_single_experts() -> None:
    (site,) = select(zoo_program("mixtral").anatomy, parsed("layers[0].ffn.experts[2].up"))
    assert (site.role, site.op, site.facts["expert"], site.shape) == ("layers[0].ffn.experts[2].up", "expert", 2, (1, 64, 32))
    assert names("layers[0].ffn.experts[*].down", "mixtral") == ["layers[0].ffn.experts.down"]
    assert fault("layers[0].ffn.experts[4].up", "mixtral").code == "S0303"


def test_created_names() -> None:
    site = next(s for s in zoo_program("bert").anatomy.sites if s.role == "layers[0].attn.q")
    assert names("@mine", created={"mine": [site]}) == ["layers[0].attn.q"]
    assert fault("@mine").code == "S0306"


@pytest.mark.parametrize(
    ("text", "family", "code", "parts"),
    [
        ("layers[*].attn.qq", "bert", "S0301", ["`layers[*]` 3 → `.attn` 3 → `.qq` 0", "did you mean `q`?"]),
        ("layers[*].attn.{q, gate}", "bert", "S0302", ["`layers[0..2].attn`", "mark the selector with `?`"]),
        ("layers[0..7].attn", "bert", "S0303", ["there are 3 layers", "from 0 to 2"]),
        ("layers[*].attn", "t5", "S0304", ["`encoder.layers` (3 layers), `decoder.layers` (3 layers)", "`decoder.layers[*]`"]),
        ("layers[*]", "swin", "S0304", ["stages[*].layers[*]"]),
        ('"encoder.layer.*.output.dens"', "bert", "S0305", ["encoder.layer.*.output.dense"]),
    ],
)
def test_diagnostics_name_counts_and_near_names(text: str, family: str, code: str, parts: list[str]) -> None:
    found = fault(text, family)
    assert found.code == code
    said = "\n".join([found.message, *found.notes, *found.help])
    assert all(p in said for p in parts), said
    assert found.span.text


# ---------------------------------------------------------------- values by layer


def sites(text: str) -> list[Site]:
    return select(zoo_program("bert").anatomy, parsed(text))


def test_values_by_layer() -> None:
    two = sites("layers[*].attn.{q, v}")
    assert expand_per_layer(8, two) == [8] * 6
    assert expand_per_layer([1, 2, 3], two) == [1, 1, 2, 2, 3, 3]
    assert expand_per_layer({range(0, 2): 4, 2: 8}, two) == [4, 4, 4, 4, 8, 8]
    ramp = ast.Call("ramp", (ast.Arg("", ast.Number(4)), ast.Arg("", ast.Number(9))))
    assert expand_per_layer(ramp, two, integer=True) == [4, 4, 7, 7, 9, 9]
    assert expand_per_layer(ramp, two) == [4.0, 4.0, 6.5, 6.5, 9.0, 9.0]
    table = ast.Table((ast.TableEntry(ast.Range(0, -2), ast.Number(1)), ast.TableEntry(ast.Range(-1, -1), ast.Number(2))))
    assert expand_per_layer(table, two) == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("value", "text", "code"),
    [
        ([1, 2], "layers[*].attn.q", "S0307"),
        ({0: 1, 1: 2}, "layers[*].attn.q", "S0308"),
        ({range(0, 3): 1, 2: 2}, "layers[*].attn.q", "S0308"),
        ([1], "pooler", "S0309"),
    ],
)
def test_faults_of_values_by_layer(value: object, text: str, code: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        expand_per_layer(value, sites(text))
    assert caught.value.diagnostics[0].code == code
