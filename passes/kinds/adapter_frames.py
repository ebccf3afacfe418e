"""Which model an adapter was trained on: the program as it is, the one that a spec opened, or the one that this was cut from; and why none fits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from surgery.core.diagnostics import Severity, Sink, SurgeryError, error
from surgery.core.near import near
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model import past
from surgery.model.adapter import Adapter, Low
from surgery.model.adapter_forms import Dense
from surgery.model.past import Ancestor
from surgery.model.program import Program
from surgery.model.weights import Reshape, select
from surgery.passes.kinds.calls import call_config, calls_of
from surgery.passes.kinds.geometry import Geometry, geometry_of
from surgery.passes.kinds.lowrank import factor_shapes

FACTORED = ("linear", "conv1d", "conv", "embedding")


@dataclass(frozen=True)
class Frame:
    """One model that an adapter may have been trained on: ``there`` finds the program's name for a name of that model and says what it was;
    ``known`` are all names it had."""

    there: Mapping[str, tuple[str, Ancestor]]
    known: frozenset[str]
    text: str

    def find(self, name: str) -> tuple[str, Ancestor] | None:
        return self.there.get(name)


def by_path(program: Program) -> dict[str, Site]:
    """The whole linear maps of a program by the path of their module; those with a role take precedence."""
    found: dict[str, Site] = {}
    for site in (*program.anatomy.modules, *program.anatomy.sites):
        if site.op in FACTORED and not site.rows and site.weight and site.calls:
            found[site.path] = site
    return found


def frames_of(program: Program, adapter: Adapter) -> list[Frame]:
    """The models that the names and shapes may be those of, the likeliest first: the first model of all, the one that the spec opened, and
    the program as it is now."""
    opened = past.opened(program)
    now = {n: tuple(program.weights[program.aliases.get(n, n)].shape) for n in (*program.weights, *program.aliases)}
    here = Frame({n: (n, Ancestor(n, s, (None,) * len(s))) for n, s in now.items()}, frozenset(now), "the model as it is here")
    if not program.past.names:
        return [here]
    frames = [_frame(opened, frozenset(program.past.names), "the model of the spec")]
    if program.past.ancestors or program.past.gone:
        frames.insert(0, _frame(past.first(program), frozenset(past.names_of_first(program.past)), "the model before it was cut"))
    theirs = str(adapter.record.get("hash") or "")
    if len(frames) > 1:
        same = theirs == program.info.hash if theirs else _last(adapter.base) == _last(program.info.ref) != ""
        if same and theirs != program.past.model.get("hash"):
            frames.reverse()
    return [*frames, here]


def _frame(ancestors: Mapping[str, Ancestor], known: frozenset[str], text: str) -> Frame:
    there: dict[str, tuple[str, Ancestor]] = {}
    for name, a in ancestors.items():
        there.setdefault(a.name, (name, a))
    return Frame(there, known, text)


def _last(ref: str) -> str:
    return PurePath(ref.removeprefix("config:")).name.lower() if ref else ""


@dataclass(frozen=True)
class Fault:
    code: str
    path: str
    text: str
    span: Span | None = None


def faults_of(program: Program, adapter: Adapter, frame: Frame, sites: Mapping[str, Site]) -> list[Fault]:
    """What of an adapter does not fit the names and shapes of one model."""
    out: list[Fault] = []
    replaced = _replaced(program)
    for low in adapter.parts.values():
        if low.experts:
            out += experts_faults(program, adapter, frame, low)
            continue
        name = f"{low.path}.weight"
        here = frame.find(name)
        if here is None:
            out += _missing(frame, name, low.path, replaced)
            continue
        site = sites.get(here[0].removesuffix(".weight"))
        if site is None:
            out.append(Fault("S0784", low.path, f"`{low.path}` is no linear layer, convolution or embedding here"))
            continue
        if not here[1].why and (text := _unlike(program, low, site, here[1].shape)):
            out.append(Fault("S0785", low.path, text))
    for part in adapter.dense.values():
        name = f"{part.path}.weight"
        here = frame.find(name)
        if here is None:
            out += _missing(frame, name, part.path, replaced)
        elif not here[1].why and (text := _unturned(program, part, sites.get(here[0].removesuffix(".weight")), here[1].shape)):
            out.append(Fault("S0785", part.path, text))
    for rows in adapter.rows.values():
        here = frame.find(f"{rows.path}.weight")
        if here is None:
            out += _missing(frame, f"{rows.path}.weight", rows.path, replaced)
        elif not here[1].why and (
            len(here[1].shape) != 2 or here[1].shape[1] != rows.stored.shape[1] or max(rows.indices, default=0) >= here[1].shape[0]
        ):
            text = f"`{rows.path}` is {list(here[1].shape)} here, and rows up to {max(rows.indices, default=0)} of {rows.stored.shape[1]} features were trained"
            out.append(Fault("S0785", rows.path, text))
    for key, load in adapter.whole.items():
        here = frame.find(key)
        if here is None:
            out += _missing(frame, key, key, replaced)
        elif not here[1].why and tuple(load.shape) != here[1].shape:
            out.append(Fault("S0785", key, f"`{key}` is {list(load.shape)} in the adapter and {list(here[1].shape)} in the model"))
    return out


def bare_parameter(program: Program, adapter: Adapter, frame: Frame, low: Low) -> tuple[str, Ancestor] | None:
    """The parameter that factors of a module's bare parameters are for. Of several in one module the first one is wrapped first, so that the last
    one has the outermost name; a module's parameters have the order in which it defines them."""
    module = re.sub(r"(\.base_layer)+$", "", low.path)
    depth = (len(low.path) - len(module)) // len(".base_layer")
    mine = [
        at for name, at in frame.there.items()
        if name.rpartition(".")[0] == module and any(name == t or name.endswith(f".{t}") for t in adapter.bare)
    ]  # fmt: skip
    order = {name: i for i, name in enumerate(program.weights)}
    mine.sort(key=lambda at: order.get(program.aliases.get(at[0], at[0]), len(order)))
    return mine[-1 - depth] if depth < len(mine) else None


def expert_sites(program: Program, name: str) -> list[Site]:
    """The parts of a tensor of experts."""
    return [s for s in program.anatomy.sites if s.op == "experts" and s.weight == name]


def experts_faults(program: Program, adapter: Adapter, frame: Frame, low: Low) -> list[Fault]:
    found = bare_parameter(program, adapter, frame, low)
    if found is None:
        return [Fault("S0784", low.path, f"`{low.path}` has no such parameter here ({', '.join(adapter.bare[:3])})")]
    name, was = found
    if was.why:
        return []
    sites = expert_sites(program, name)
    if not sites or len(was.shape) != 3:
        return [Fault("S0784", low.path, f"`{name}` is no tensor of experts here")]
    have = (low.experts, low.a.shape[1], low.b.shape[0])
    if have not in ((was.shape[0], was.shape[1], was.shape[2]), (was.shape[0], was.shape[2], was.shape[1])):
        return [
            Fault(
                "S0785",
                low.path,
                f"`{name}` is {list(was.shape)} here, and the adapter is for {have[0]} experts with {have[1]} and {have[2]} features",
            )
        ]
    out, inp = was.shape[sites[0].out_axis], was.shape[sites[0].in_axis]
    if out == inp and sites[0].out_axis > sites[0].in_axis:
        text = f"`{name}` is {list(was.shape)}, inputs first, and the file does not say which of its factors is for the inputs"
        return [Fault("S0785", low.path, text)]
    return []


def _missing(frame: Frame, name: str, path: str, replaced: Mapping[str, Any]) -> list[Fault]:
    """A tensor that is not in the program: no fault where a statement dropped it, one where it was replaced or never there."""
    if name in replaced:
        gone = replaced[name]
        return [Fault("S0784", path, f"`{path}` was {gone.how}", gone.origin.span)]
    if name in frame.known:
        return []
    return [Fault("S0784", path, f"the model has no `{path}`")]


def _replaced(program: Program) -> dict[str, Any]:
    """Weights that statements replaced by something else, by the names that they had."""
    found: dict[str, Any] = {}
    layers: dict[tuple[str, int | None, str], Any] = {}
    for gone in program.gone.values():
        if not gone.heir:
            continue
        if gone.site.weight:
            found[program.past.former(gone.site.weight)] = gone
        layers[gone.site.stack, gone.site.layer, gone.site.role.rpartition(".")[2]] = gone
    return found


def _unlike(program: Program, low: Low, site: Site, shape: tuple[int, ...]) -> str:
    """Why factors do not fit a weight of ``shape``, or an empty text."""
    geometry = geometry_then(program, site, shape)
    if low.embedding != (geometry.op == "embedding"):
        return f"`{low.path}` is {'an embedding' if low.embedding else 'a linear map'} in the adapter and {'no embedding' if low.embedding else 'an embedding'} here"
    want = factor_shapes(geometry, low.rank)
    low = fitted(low, geometry)
    have = (tuple(low.a.shape), tuple(low.b.shape))
    if geometry.op == "conv" and (geometry.groups > 1 or any(d != 1 for d in geometry.dilation)):
        return f"`{low.path}` is a convolution in groups or with gaps, for which such files hold another change than one of its kernel"
    if have != want:
        return f"`{low.path}` is [{geometry.out}, {geometry.inp}] here and [{have[1][0]}, {have[0][1]}] in the adapter"
    if low.magnitude is not None and int(np.prod(low.magnitude.shape)) != geometry.out:
        return f"the magnitude of `{low.path}` has {int(np.prod(low.magnitude.shape))} entries for {geometry.out} outputs"
    return ""


def _unturned(program: Program, part: Dense, site: Site | None, shape: tuple[int, ...]) -> str:
    """Why a weight cannot become that function of itself, or an empty text."""
    geometry = geometry_then(program, site, shape) if site is not None else None
    verb = {"stretched": "stretch", "turned": "turn"}.get(part.function, "change")
    if (
        geometry is None
        or geometry.op not in ("linear", "conv")
        or (geometry.op == "conv" and (part.function != "stretched" or geometry.groups > 1))
    ):
        return f"`{part.path}` is no layer here that such an adapter can {verb}"
    if part.bias_tensors and site is not None and not site.bias:
        return f"`{part.path}` has no bias here, and the adapter changes one"
    given = dict(part.params)
    wrong = (
        (part.out and part.out != geometry.out)
        or any(n % int(given.get("multiple", 1)) for n in (geometry.out, geometry.inp)) or geometry.out % int(given.get("repeats", 1))
        or int(given.get("smaller", 0)) not in (0, min(geometry.out, geometry.inp)) or int(given.get("larger", 1 << 62)) < max(geometry.out, geometry.inp)
        or int(given.get("count", 0)) > geometry.out * geometry.inp
    )  # fmt: skip
    if wrong:
        return f"`{part.path}` is [{geometry.out}, {geometry.inp}] here, and the adapter is for a layer of another size"
    have = geometry.inp if part.axis == "in" else geometry.out
    block = dict(part.params).get("block", 1)
    if (part.size and part.size != have) or have % block:
        return f"`{part.path}` has {have} {'inputs' if part.axis == 'in' else 'outputs'} here, and the adapter is for {part.size or f'a multiple of {block}'}"
    return ""


def fitted(low: Low, geometry: Geometry) -> Low:
    """Factors that were computed from another kind of adapter, in the layout that a layer's factors have: shared ones are cut to its inputs, those of
    a convolution get their kernel."""
    if not low.made:
        return low
    a, b = low.a, low.b
    if low.shared and a.shape[1] > geometry.fan_in:
        a = select(a, 1, ((0, geometry.fan_in),))
    want = factor_shapes(geometry, low.rank)
    if geometry.op == "conv" and all(math.prod(e.shape) == math.prod(w) for e, w in zip((a, b), want, strict=True)):
        a, b = Reshape(want[0], a.dtype, a), Reshape(want[1], b.dtype, b)
    return replace(low, a=a, b=b)


def geometry_then(program: Program, site: Site, shape: Sequence[int]) -> Geometry:
    """The geometry of a site whose stored weight has (or had) this shape."""
    graph, node = calls_of(program, site)[0]
    return geometry_of(site, tuple(shape), call_config(program, graph, node))


def refusal(adapter: Adapter, problems: Sequence[Fault], span: Span, paths: Sequence[str]) -> SurgeryError:
    sink = Sink()
    for code in ("S0784", "S0785"):
        mine = [p for p in problems if p.code == code]
        if not mine:
            continue
        first, more = mine[0], len(mine) - 1
        also = [(p.span, "by this statement") for p in mine[:1] if p.span is not None and p.span.end]
        base = f"the adapter says that it was trained on {adapter.base!r}" if adapter.base else ""
        tail = f", and {more} more part{'s' if more > 1 else ''} like it" if more else ""
        if code == "S0784":
            help = (
                "open the model that it was trained on"
                if first.span is None
                else "merge it above that statement, or train it on what stands there now"
            )
            sink.add(error(code, f"{adapter.name} has parts for what is not there: {first.text}{tail}", span, "merged here", also=also, notes=[base] if base else [], help=[help, *_likely(first, paths)]))  # fmt: skip
        else:
            sink.add(error(code, f"{adapter.name} does not fit: {first.text}{tail}", span, "merged here", notes=[base] if base else [], help="open the model that it was trained on"))  # fmt: skip
    return SurgeryError(*sink.items)


def _likely(first: Fault, paths: Sequence[str]) -> list[str]:
    """What else may be wrong with a path that the model does not have; ``paths`` are those of its layers."""
    if first.span is not None:
        return []
    if re.search(r"experts\.\d+\.", first.path):
        return ["the model keeps its experts in one tensor: train on it as it is now, or convert the adapter with peft first"]
    head, _, rest = first.path.partition(".")
    if rest in paths:
        return [f"it was trained on a model that holds this one as `{head}`: open that model, with its head"]
    longer = next((p for p in paths if p.endswith(f".{first.path}")), "")
    if longer:
        return [f"here it is `{longer}`: open the model inside of the one that is opened"]
    near_ = near(first.path, paths)
    return [f"did you mean `{near_[0]}`?"] if near_ else []


def named_otherwise(program: Program, adapter: Adapter, span: Span) -> list[Any]:
    """S0788 where the adapter says that it belongs to another model than this one or what this one was made from."""
    hashes = {program.info.hash, program.past.model.get("hash", "")} - {""}
    theirs = str(adapter.record.get("hash") or "")
    if theirs and hashes and theirs in hashes:
        return []
    names = {
        _last(program.info.ref),
        _last(program.past.model.get("ref", "")),
        _last(str(program.info.config.get("_name_or_path") or "")),
    } - {""}
    mine = _last(adapter.base)
    if (not theirs and (not mine or mine in names)) or not names:
        return []
    what = f"{adapter.base!r}" if adapter.base else "another model"
    return [
        error(
            "S0788", f"{adapter.name} was trained on {what}, and the model is {sorted(names)[0]!r}", span, "merged here", severity=Severity.WARNING,
            notes=("names and shapes fit",) if not theirs else ("names and shapes fit; the stored tensors of the two differ in layout or type",),
            help="if the two are the same weights under two names, go on",
        )
    ]  # fmt: skip
