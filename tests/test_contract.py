"""The contract that every method keeps, checked over the registry: a new method is covered here with no new line."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from surgery.core.diagnostics import SurgeryError
from surgery.core.method import Method
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.passes import registry
from surgery.train import disabled
from tests import workbench
from tests.captured_programs import zoo_program
from tests.workbench import difference, fold_all, live, operation, perturb, run

METHODS = registry.methods()
ATTACHING = [key for key, cls in METHODS.items() if cls.kind in ("delta", "insert")]
ROLES = {
    "delta": [
        "embed.tokens", "layers[0].attn.q", "layers[0].attn.v", "layers[0].attn.o", "layers[0].ffn.up", "layers[0].ffn.experts.up",
        "layers[0].ffn.experts.down", "stem.conv[0]", "stem.conv[1]", "head",
    ],
    "stream": ["layers[0].attn", "layers[0].ffn", "layers[0].attn.o"],
    "attention": ["layers[0].attn", "layers[2].attn"],
    "tokens": ["embed.tokens"],
}  # fmt: skip


def roles_of(cls: type[Method]) -> list[str]:
    return ROLES[cls.stands or cls.kind]


def bench_program(cls: type[Method]) -> Program:
    """A model with the places that a method can stand at: a hand-made graph, or a captured one where it takes a real attention."""
    return zoo_program("llama")[0] if cls.stands in ("attention", "tokens") else workbench.bench_program()


def inputs(cls: type[Method]) -> tuple[torch.Tensor, ...]:
    return tuple(zoo_program("llama")[1]) if cls.stands in ("attention", "tokens") else workbench.inputs()


def outputs(cls: type[Method], program: Program, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return workbench.outputs(program, *inputs(cls), dtype=dtype)


def sample(cls: type[Method]) -> dict[str, object]:
    """Values for the parameters that have no default, small ones for sizes."""
    values: dict[str, object] = {}
    for p in cls.info().params:
        if p.required:
            values[p.name] = p.choices[0] if p.choices else {"int": int(p.min or 0) + 3, "float": 0.5, "bool": True, "str": "x"}[p.type]
        elif p.type == "int" and isinstance(p.default, int) and p.default > 4 and p.name in ("rank", "width", "block"):
            values[p.name] = 4
    return values


def attached(key: tuple[str, str], seed: int = 0, roles: list[str] | None = None, place: str = "") -> Program:
    """The workbench with the method on every site that it accepts; at least one."""
    cls = METHODS[key]
    program = bench_program(cls)
    done = 0
    for role in roles or roles_of(cls):
        try:
            run(program, operation(program, *key, [role], place or cls.places[0], seed=seed, **sample(cls)))
            done += 1
        except SurgeryError as exc:
            assert exc.diagnostics[0].code in ("S0270", "S0271"), exc
    assert done
    return program


def values(program: Program) -> dict[str, torch.Tensor]:
    return Tensors(registry.function).all(program)


def parameters(program: Program) -> int:
    return sum(p.numel() for p in program.graph.parameters())


@pytest.mark.parametrize("key", list(METHODS), ids="/".join)
def test_is_documented_and_has_its_own_kind(key: tuple[str, str]) -> None:
    info = METHODS[key].info()
    assert len(info.summary) < 120 and info.summary.endswith("."), info.summary
    assert all(p.help for p in info.params)
    assert callable(import_module(f"surgery.passes.kinds.{info.kind}").apply)
    assert METHODS[key](**sample(METHODS[key])).params().keys() == {p.name for p in info.params}


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_counts_what_it_adds(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    for role in roles_of(cls):
        program = bench_program(cls)
        before, total = set(program.weights), parameters(program)
        try:
            change = run(program, operation(program, *key, [role], cls.places[0], **sample(cls)))[0]
        except SurgeryError:
            continue
        attachment = program.attachments[-1]
        module = program.module(attachment.module)
        sizes = {n: p.numel() for n, p in module.named_parameters()}
        assert sum(sizes.values()) == module.method.count(module.site), role
        assert change.added == parameters(program) - total  # an untied weight counts, too
        assert {f"{attachment.module}.{n}" for n in sizes} <= set(program.weights) - before
        assert change.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
@pytest.mark.parametrize("place", ["on", "after", "before", "beside"])
def test_identity_at_the_start(key: tuple[str, str], place: str) -> None:
    cls = METHODS[key]
    if place not in cls.places:
        pytest.skip("not a place of this method")
    if cls.identity == "changed":
        pytest.skip("says that it changes the model")
    bound = {"exact": 0.0, "near": cls.identity_bound}[cls.identity]
    assert difference(outputs(cls, attached(key, place=place)), outputs(cls, bench_program(cls))) <= bound


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_only_declared_parameters_train(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    program = attached(key)
    declared = {t for a in program.attachments for t in a.tensors} - program.frozen
    module = live(program).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    names = {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert names == declared
    before = {n: p.detach().clone() for n, p in module.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):  # what starts behind a zero factor gets its gradient from the second step on
        sum(o.square().mean() for o in module(*inputs(cls))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(module.named_parameters(remove_duplicate=False))
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == declared
    assert all(torch.isfinite(p).all() for p in after.values())


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_folded_equals_unfolded_and_folding_twice_is_folding_once(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    for place in cls.places:
        program = attached(key, place=place)
        perturb(program)
        expected = outputs(cls, program)
        assert difference(expected, outputs(cls, bench_program(cls))) > 1e-3, "the test must see the change"
        changes = fold_all(program)
        assert difference(outputs(cls, program), expected) <= 1e-5
        assert all(c.note for c in changes)
        if cls.fold_class == "merge":
            assert not program.attachments and not [m for m in program.graph.modules() if hasattr(m, "surgery_events")]
            assert len(changes) >= 1 and all(c.removed > 0 for c in changes)
        exprs = dict(program.weights)
        again = fold_all(program)
        assert program.weights == exprs and not any(c.removed for c in again)


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_disabling_restores_the_base(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    program = attached(key)
    if any(program.module(a.module).method.rebase(program.module(a.module).site) for a in program.attachments if a.method.kind == "delta"):
        pytest.skip("moves a part of the base weight into the adapter")
    perturb(program)
    module = live(program)
    with disabled(module), torch.no_grad():
        off = list(module(*inputs(cls)))
    assert difference(off, outputs(cls, bench_program(cls))) == 0
    with torch.no_grad():
        assert difference(list(module(*inputs(cls))), off) > 1e-3


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_seeds_decide_the_initial_values(key: tuple[str, str]) -> None:
    first, same, other = (values(attached(key, seed=s)) for s in (1, 1, 2))
    assert first.keys() == same.keys() and all(torch.equal(first[n], same[n]) for n in first)
    random = any(type(e).__name__ == "Init" and e.kind in ("normal", "uniform") for e in attached(key).weights.values())
    assert random == any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_runs_in_bfloat16(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    program = attached(key)
    got = outputs(cls, program, dtype=torch.bfloat16)
    assert all(o.dtype == torch.bfloat16 and torch.isfinite(o).all() for o in got)
    assert difference(got, outputs(cls, program)) < 0.06
    module = live(program).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = sum(o.float().square().mean() for o in module(*inputs(cls)))
    total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_saved_and_loaded_as_data(key: tuple[str, str]) -> None:
    from surgery.model import graphjson

    cls = METHODS[key]
    program = attached(key)
    perturb(program)
    expected = outputs(cls, program)
    program.graph = graphjson.load(graphjson.dump(program.graph))
    assert difference(outputs(cls, program), expected) == 0
    names = set(program.weights) | set(program.aliases)
    held = [*program.graph.named_parameters(remove_duplicate=False), *program.graph.named_buffers(remove_duplicate=False)]
    assert {n for n, _ in held} == names


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_compiles_without_graph_breaks(key: tuple[str, str]) -> None:
    cls = METHODS[key]
    program = attached(key)
    perturb(program)
    module = live(program).train()
    eager = list(module(*inputs(cls)))
    sum(o.square().mean() for o in eager).backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    compiled = list(torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs(cls)))
    assert difference([c.detach() for c in compiled], [e.detach() for e in eager]) <= 1e-6
    sum(o.square().mean() for o in compiled).backward()
    for name, parameter in module.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("key", list(METHODS), ids="/".join)
def test_parse_and_print_agree(key: tuple[str, str]) -> None:
    from surgery.core.printer import to_text
    from surgery.core.source import Source
    from surgery.grammar.parser import parse

    cls = METHODS[key]
    given = {**{p.name: p.default for p in cls.info().params if p.default is not None}, **sample(cls)}
    call = ", ".join(f"{name} = {literal(value)}" for name, value in given.items())
    where = " of one * 0.5, two" if key[0] == "merge" else f" {cls.places[0]} layers[*].attn" if cls.places else ""
    line = f"{key[0]} {key[1]}({call}){where}"
    tree, problems = parse(Source("spec.surg", f"surg 1\n{line}\n"))
    assert not problems and len(tree.statements) == 2
    again, problems = parse(Source("spec.surg", "".join(to_text(s) + "\n" for s in tree.statements)))
    assert not problems and again.statements == tree.statements


def literal(value: object) -> str:
    """A parameter value as a spec writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_a_stored_program_can_be_folded_later(key: tuple[str, str]) -> None:
    import json

    from surgery.model.record import program_of, record_of

    cls = METHODS[key]
    program = attached(key)
    perturb(program)
    expected = outputs(cls, program)
    record = json.loads(json.dumps({**record_of(program), "graph": None}))
    record["graph"] = record_of(program)["graph"]
    later = program_of(record, type(program.weights)(program.weights), registry.get)
    later._anatomy = program.anatomy
    assert difference(outputs(cls, later), expected) == 0
    assert later.attachments == program.attachments and later.frozen == program.frozen
    fold_all(later)
    assert difference(outputs(cls, later), expected) <= 1e-5
