"""The checker: what it reports, what it hands on, and that it is linear."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from surgery.core import ast
from surgery.core.catalogue import Catalogue, load_catalogue
from surgery.core.checker_ranges import overlapping
from surgery.core.diagnostics import Diagnostic
from surgery.core.source import Source
from surgery.core.spec import Spec, scalar
from surgery.front import check_source


def run(text: str, sets: dict[str, str] | None = None, name: str = "spec.surg") -> tuple[Spec, list[Diagnostic]]:
    return check_source(Source(name, text if text.startswith("surg ") else f"surg 1\n{text}\n"), sets)


def codes(text: str, sets: dict[str, str] | None = None) -> list[str]:
    return [d.code for d in run(text, sets)[1]]


def test_values_become_python_values() -> None:
    spec, found = run(
        'model "minilm"\nparam r = 4\nlet q = layers[6..].attn.q\n'
        "adapt lora(rank = r, alpha = 1e1, dropout = 5%, seed = 3) on q as queries\n"
        "expect trainable <= 50% of base for queries\n"
        "expect same_output(at = init) within 1e-6\n"
        'emit onnx(precision = fp16, live = true) to "out"'
    )
    assert found == []
    model, adapt, quantity, check, emit = spec.statements
    assert isinstance(model.node, ast.Model) and spec.model is model
    assert adapt.call is not None and adapt.call.args == {"rank": 4, "alpha": 10.0, "dropout": 0.05, "seed": 3}
    assert type(adapt.call.args["rank"]) is int and type(adapt.call.args["alpha"]) is float
    assert isinstance(adapt.node, ast.Operation)
    step = adapt.node.selectors[0].steps[0]
    assert isinstance(step, ast.Step) and step.name == "layers", "the let is replaced"
    assert isinstance(quantity.node, ast.ExpectQuantity) and quantity.node.of_base
    assert check.within == 1e-6 and check.call is not None and check.call.get("at") == "init"
    assert emit.call is not None and emit.call.values() | {"opset": 0} == {
        "opset": 0, "precision": "fp16", "target": "cpu", "cache": None, "live": True, "optimize": "all",
    }  # fmt: skip
    assert spec.created == {"queries": 1} and spec.params == {"r": 4}


def test_values_by_layer_stay_trees_with_names_replaced() -> None:
    spec, found = run(
        "param r = 4\nadapt lora(rank = {0..3: r, 4..11: 8}, alpha = ramp(4, 16)) on layers[*].attn.q\nadapt lora(rank = [r, 8]) on layers[0, 1].attn.q"
    )
    assert found == []
    first, second = spec.statements
    assert first.call is not None and second.call is not None
    table, ramp, items = first.call.args["rank"], first.call.args["alpha"], second.call.args["rank"]
    assert isinstance(table, ast.Table) and [scalar(e.value) for e in table.entries] == [4, 8]
    assert isinstance(ramp, ast.Call) and [scalar(a.value) for a in ramp.args] == [4, 16]
    assert isinstance(items, ast.ListValue) and scalar(items) == (4, 8)


def test_let_can_be_continued_and_chained() -> None:
    spec, found = run(
        'let late = layers[6..]\nlet attn = late.attn\nlet path = "encoder.*.dense"\nadapt lora on attn.{q, v}, late.ffn.up, path'
    )
    assert found == []
    node = spec.statements[0].node
    assert isinstance(node, ast.Operation)
    names = [[s.name if isinstance(s, ast.Step) else "{}" for s in sel.steps] for sel in node.selectors]
    assert names == [["layers", "attn", "{}"], ["layers", "ffn", "up"], []]
    assert node.selectors[2].raw == "encoder.*.dense"


def test_bare_share_is_accepted_only_as_a_fraction() -> None:
    assert codes("adapt lora(dropout = 0.3) on layers") == []
    assert codes("adapt lora(dropout = 0) on layers") == []
    assert codes("adapt lora(dropout = 1.5) on layers") == ["S0223"]
    assert codes("expect sparsity >= 0.3") == []
    assert codes("expect sparsity >= 30") == ["S0223"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("adapt lora(rank = 2GiB) on layers", "S0223"),
        ("adapt lora(rank = 1.5) on layers", "S0220"),
        ("adapt lora(rank = gelu) on layers", "S0201"),
        ("adapt lora(rank = true) on layers", "S0220"),
        ("adapt lora(rank = [8, 0]) on layers", "S0222"),
        ("adapt lora(rank = [8, 8%]) on layers", "S0223"),
        ("adapt lora(rank = {3..1: 8}) on layers", "S0226"),
        ("adapt lora(rank = ramp(1)) on layers", "S0227"),
        ("adapt lora(rank = other(1, 2)) on layers", "S0220"),
        ("adapt lora(seed = [1, 2]) on layers", "S0224"),
        ("adapt bitfit(rank = 8) on layers", "S0212"),
        ("adapt lora on layers[5..2]", "S0226"),
        ("expect bytes <= 100", "S0223"),
        ("expect params <= -1", "S0222"),
        ("expect same_output within 5GB", "S0220"),
        ("expect same_output(at = end)", "S0221"),
        ("expect sparsity <= 30% of base", "S0232"),
        ("expect params <= 1 for nothing", "S0201"),
        ('emit torch(dtype = "bf16") to "x"', "S0220"),
        ('adapter a = open("x")', "S0216"),
        ("freeze all on @none", "S0201"),
        ("prune nothing_like_it(ratio = 30%) on layers", "S0211"),
    ],
)
def test_one_mistake_gives_one_report(text: str, code: str) -> None:
    assert codes(text) == [code]


def test_all_mistakes_of_a_file_are_reported_in_its_order() -> None:
    found = run("adapt lorra on layers\nadapt lora(rnk = 8) on layers\nemit onxx to 'x'\nemit onxx to \"x\"")[1]
    assert [d.code for d in found if d.code.startswith("S02")] == ["S0211", "S0212", "S0213"]
    assert [d.span.line for d in found] == sorted(d.span.line for d in found)


def test_near_names_and_their_fix() -> None:
    d = run("adapt lorra on layers")[1][0]
    assert d.help[0] == "did you mean `lora` or `dora`?"
    assert d.fix is not None and d.fix.replacement == "lora" and not d.fix.safe and d.fix.span.text == "lorra"


def test_method_of_another_verb_is_named() -> None:
    d = run("insert lora on layers")[1][0]
    assert d.code == "S0211" and "`lora` belongs to `adapt`" in d.help[0]


def test_broken_definitions_are_reported_once() -> None:
    assert codes("param r\nadapt lora(rank = r) on layers\nadapt lora(rank = r) on layers") == ["S0206"]
    assert codes('import "gone.surg" as x\nadapt lora(rank = x.r) on x.sel') == ["S0205"]


def test_sets() -> None:
    spec, found = run("param r = 8\nadapt lora(rank = r) on layers", {"r": "16"})
    assert found == [] and spec.params == {"r": 16}
    assert codes("param r = 8\nadapt lora(rank = r) on layers", {"r": "16%"}) == ["S0223"]
    assert codes("param r = 8\nadapt lora(rank = r) on layers", {"r": "{0..3: 4, 4..: 8}"}) == []
    assert codes("param r = 8", {"r": "'"}) == ["S0208"]
    assert codes("param r = 8", {"r": '"text"'}) == ["S0208"]
    found = run("param r = 8\nadapt lora(rank = r) on layers", {"r": "0"})[1]
    assert found[0].labels[0].span.text == "r" and found[0].labels[1].span.text == "0", "the use, and where the value comes from"


def test_unnamed_and_named_models() -> None:
    spec, found = run('model "a"\nmodel "b" as other')
    assert found == [] and list(spec.models) == ["a", "other"] and spec.model is spec.models["a"]
    assert codes('model "a" as x\nmodel "b"') == ["S0234"]
    assert run("adapt lora on layers")[0].model is None


def test_imports(tmp_path: os.PathLike[str]) -> None:
    folder = str(tmp_path)

    def write(name: str, text: str) -> None:
        with open(os.path.join(folder, name), "w") as f:
            f.write("surg 1\n" + text + "\n")

    write("deep.surg", "param r = 2\nlet qs = layers[0..3].attn.q")
    write("calib.surg", 'import "deep.surg" as deep\nparam n = 64\ndata text = lines("c.txt", samples = n)\nadapter news = load("news")')
    main = os.path.join(folder, "main.surg")
    spec, found = run('import "calib.surg" as c\nadapt lora(rank = c.deep.r) on c.deep.qs using c.text', {"c.n": "32"}, main)
    assert [d.code for d in found] == ["S0238"]  # the name is known; lora is no method that reads data
    assert spec.statements[0].call is not None and spec.statements[0].call.args["rank"] == 2
    data = spec.data["c.text"]
    assert data.call is not None and data.call.args["samples"] == 32
    assert os.path.basename(data.node.span.source.name) == "calib.surg"
    assert len(spec.imports) == 2
    found = run('import "calib.surg" as c\nadapt lora(rank = c.m) on layers', None, main)[1]
    assert [d.code for d in found] == ["S0201"] and "`c.n`" in found[0].help[0]
    write("bad.surg", "param r = \nlet x = 5")
    found = run('import "bad.surg" as b\nadapt lora on layers', None, main)[1]
    assert found and found[0].span.source.name.endswith("bad.surg")


def test_import_diamonds_are_read_once(tmp_path: os.PathLike[str]) -> None:
    """Thirty files that each import the next one twice: 2^30 paths, 30 reads."""
    for i in range(30):
        body = f'import "f{i + 1}.surg" as a\nimport "f{i + 1}.surg" as b' if i < 29 else "param r = 8"
        with open(os.path.join(tmp_path, f"f{i}.surg"), "w") as f:
            f.write(f"surg 1\n{body}\n")
    start = time.process_time()
    spec, found = check_source(Source(os.path.join(tmp_path, "main.surg"), 'surg 1\nimport "f0.surg" as f\n'))
    assert found == [] and len(spec.imports) == 30
    assert time.process_time() - start < 5


def test_order_warnings_do_not_stop_a_spec() -> None:
    _, found = run('adapt lora on layers as a\nemit torch to "x"\nfold all\nemit onnx to "y"')
    assert found == [], "a change between two outputs is in the second"
    _, found = run('adapt lora on layers\nemit torch to "x"\nfold all')
    assert [d.code for d in found] == ["S0404"] and not found[0].is_error


def test_a_name_may_be_a_word_of_the_language() -> None:
    _, found = run("param on = 8\nlet layers2 = layers[0]\nadapt lora(rank = on) on layers2.attn.q as data")
    assert found == []


def test_overlapping_ranges_agree_with_sets() -> None:
    import random

    rng = random.Random(0)
    for _ in range(3000):
        keys = [ast.Range(a := rng.randrange(20), a + rng.randrange(12), rng.randrange(1, 5)) for _ in range(rng.randrange(1, 5))]
        members = [set(range(k.start, (k.stop or 0) + 1, k.step)) for k in keys]
        shared = any(members[i] & members[j] for i in range(len(keys)) for j in range(i))
        found = overlapping(keys)
        assert bool(found) == shared, keys
        if found:
            first, second, index = found[0]
            assert all(index in range(k.start, (k.stop or 0) + 1, k.step) for k in (first, second))
    assert overlapping([ast.Range(0, 4), ast.Range(3, None)])[0][2] == 3
    assert not overlapping([ast.Range(0, 3), ast.Range(-2, -1)])


def test_time_is_linear_in_statements() -> None:
    def spent(count: int) -> float:
        body = "".join(
            f"adapt lora(rank = r, dropout = 5%) on late.attn.{{q, v}} as n{i}\nfreeze all on @n{i}\n" for i in range(count // 2)
        )
        text = f'surg 1\nmodel "minilm"\nparam r = 8\nlet late = layers[6..]\n{body}'
        start = time.process_time()
        spec, found = check_source(Source("big.surg", text))
        assert found == [] and len(spec.statements) == count + 1
        return time.process_time() - start

    small = min(spent(2000) for _ in range(2))
    assert spent(20000) < 25 * small, "ten times the statements cost more than twice ten times the time"


def test_the_front_end_imports_no_torch(tmp_path: os.PathLike[str]) -> None:
    spec = os.path.join(tmp_path, "a.surg")
    with open(spec, "w") as f:
        f.write("surg 1\nadapt lora(rank = 8) on layers[*].attn.q\n")
    code = (
        "import sys, surgery\nfrom surgery.cli.main import main\n"
        f"for args in (['check', {spec!r}], ['fmt', '--check', {spec!r}], ['explain', 'lora'], ['explain', 'S0212'], ['methods'], ['--version'],"
        f" ['--help'], ['fix', {spec!r}], ['new', 'spec', {spec + '2.surg'!r}], ['check', {spec!r}, '--format', 'sarif'], ['completion', 'bash'],"
        f" ['new', 'method', 'adapt/mine', '--folder', {os.fspath(tmp_path)!r}]):\n"
        "    code = main(args)\n"
        "    assert code == 0 or args[:2] == ['new', 'method'], (args, code)\n"
        "assert surgery.check('surg 1\\n') == []\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'networkx', 'lark', 'typer', 'rich') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_catalogue_is_fresh() -> None:
    from surgery.core import catalogue
    from surgery.passes import registry

    assert catalogue.CATALOGUE_FILE.read_text("utf-8") == catalogue.render(registry.catalogue()), "run `python -m surgery.dev generate`"
    assert Catalogue.of(registry.catalogue()).methods == catalogue.load().methods


def test_a_statement_without_a_place_is_shown_one_that_fits_its_method() -> None:
    """From the method's own example, and the statement with that place is right."""
    for method in load_catalogue().methods.values():
        if not method.needs_sites or any(p.required for p in method.params):
            continue
        call = f"{method.verb} {method.name}"
        (found,) = [d for d in run(call)[1] if d.code == "S0229"]
        place = found.help[0].removeprefix("add for example `").removesuffix("`")
        assert "S0228" not in codes(f"{call} {place}") and "S0229" not in codes(f"{call} {place}"), (call, place)
    assert "on embed.tokens`" in run("insert prompt")[1][0].help[0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("prune heads(ratio = 25%, keep = 3) on layers[*].attn", "`ratio` and `keep` both say how much `prune heads` removes"),
        ("skip bypass(keep = 1, count = 2) on layers", "`count` and `keep` both say how much `skip bypass` removes"),
    ],
)
def test_two_amounts_are_one_too_many_without_a_model(call: str, said: str) -> None:
    (found,) = run(call)[1]
    assert (found.code, found.message) == ("S0272", said)
    assert codes("prune heads(ratio = 25%) on layers[*].attn") == []
