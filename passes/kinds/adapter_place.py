"""Where the parts of an adapter stand in a program: by path, through cuts and new numbers of layers, and restricted by selectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from surgery.core.diagnostics import Sink, SurgeryError, error, fail
from surgery.core.near import near
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model import past
from surgery.model.adapter import Adapter, Low
from surgery.model.cut_attached import Around
from surgery.model.dims.masks import to_ranges
from surgery.model.past import Ancestor
from surgery.model.program import Program
from surgery.model.weights import Apply, Concat, Expr, Scale, cast, select
from surgery.passes.kinds.adapter_variant import Variant, plain, variant
from surgery.passes.kinds.calls import call_config, calls_of
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.follow import follow_delta
from surgery.passes.kinds.geometry import Geometry, geometry_of
from surgery.passes.kinds.lowrank import factor_shapes

FACTORED = ("linear", "conv1d", "conv", "embedding")


@dataclass(frozen=True)
class Placed:
    """One part of an adapter at one site: ``method`` computes its change from ``tensors`` (expressions, in the layout of the method).

    ``weight`` is the program's stored weight, ``origin`` the one that the part was trained on, where it is known, and ``direct`` says that the two
    are one.
    """

    site: Site
    geometry: Geometry
    method: DeltaMethod
    tensors: Mapping[str, Expr]
    weight: Expr
    shift: Expr | None = None
    origin: Expr | None = None
    direct: bool = True

    def low(self) -> tuple[Expr, Expr, float] | None:
        """``A``, ``B`` and scale of a plain low-rank change that equals this one, None where there is none (or the weight for it is not known)."""
        method: Any = self.method
        if method.wants_weight():
            return None
        a, b, scale = self.tensors["A"], self.tensors["B"], float(method.scale())
        rebase = method.rebase(self.geometry)
        if rebase is None:
            return a, b, scale
        if self.origin is None:
            return None
        params = (*((k, v) for k, v in method.params().items() if k not in ("seed", "shared")), ("site", self.geometry.pairs()))
        specs = {s.name: s for s in method.tensors(self.geometry)}
        first = {
            n: Apply(s.shape, "float32", f"{method.verb}/{method.name}:{s.init}", (self.origin,), params, s.output)
            for n, s in specs.items()
        }
        minus = Scale(first["B"].shape, "float32", first["B"], -1.0)
        return _beside((a, first["A"]), 0), _beside((b, minus), 1), scale


def _beside(parts: tuple[Expr, ...], axis: int) -> Expr:
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return Concat(tuple(shape), "float32", parts, axis)


@dataclass
class Placement:
    """All of one adapter: its ``parts`` by path in the program, tensors of the base that it replaces by name, and what was ``dropped``:
    modules of the base that earlier statements took away. ``carried`` says that something was cut on the way."""

    adapter: Adapter
    parts: dict[str, Placed] = field(default_factory=dict)
    whole: dict[str, Expr] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    carried: bool = False


@dataclass(frozen=True)
class _Frame:
    """One model that an adapter may have been trained on: ``there`` finds the program's name for a name of that model and says what it was;
    ``known`` are all names it had."""

    there: Mapping[str, tuple[str, Ancestor]]
    known: frozenset[str]
    text: str

    def find(self, name: str) -> tuple[str, Ancestor] | None:
        return self.there.get(name)


def place(program: Program, adapter: Adapter, span: Span) -> tuple[Placement, list[Any]]:
    """Every part at its site, and warnings.

    Raises S0784 (modules that the model does not have), S0785 (shapes that do not fit), S0789 (what cannot be carried over a cut).
    """
    sites = _by_path(program)
    frames = _frames(program, adapter)
    faults = [(_faults(program, adapter, frame, sites), frame) for frame in frames]
    found = next((frame for problems, frame in faults if not problems), None)
    if found is None:
        problems, _ = min(faults, key=lambda f: len(f[0]))
        raise _refuse(adapter, problems, span, list(sites))
    out = Placement(adapter)
    for low in adapter.parts.values():
        here = found.find(f"{low.path}.weight")
        if here is None:
            out.dropped.append(low.path)
            continue
        name, was = here
        placed = _placed(program, adapter, low, sites[name.removesuffix(".weight")], was, span)
        out.parts[placed.site.path] = placed
        out.carried |= was.cut
    for key, load in adapter.whole.items():
        here = found.find(key)
        if here is None:
            out.dropped.append(key.rpartition(".")[0])
            continue
        name, was = here
        if was.why:
            raise _stuck(adapter, key, was.why, span)
        expr: Expr = load
        for axis, mask in enumerate(was.kept):
            expr = expr if mask is None else select(expr, axis, to_ranges(mask))
        out.whole[name] = expr
        out.carried |= was.cut
    return out, _named_otherwise(program, adapter, span)


def _by_path(program: Program) -> dict[str, Site]:
    """The whole linear maps of a program by the path of their module; those with a role take precedence."""
    found: dict[str, Site] = {}
    for site in (*program.anatomy.modules, *program.anatomy.sites):
        if site.op in FACTORED and not site.rows and site.weight and site.calls:
            found[site.path] = site
    return found


# ------------------------------------------------------------------ which model it was trained on


def _frames(program: Program, adapter: Adapter) -> list[_Frame]:
    """The models that the names and shapes may be those of, the likeliest first: the first model of all, the one that the spec opened, and
    the program as it is now."""
    opened = past.opened(program)
    now = {n: tuple(program.weights[program.aliases.get(n, n)].shape) for n in (*program.weights, *program.aliases)}
    here = _Frame({n: (n, Ancestor(n, s, (None,) * len(s))) for n, s in now.items()}, frozenset(now), "the model as it is here")
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


def _frame(ancestors: Mapping[str, Ancestor], known: frozenset[str], text: str) -> _Frame:
    there: dict[str, tuple[str, Ancestor]] = {}
    for name, a in ancestors.items():
        there.setdefault(a.name, (name, a))
    return _Frame(there, known, text)


def _last(ref: str) -> str:
    return PurePath(ref.removeprefix("config:")).name.lower() if ref else ""


@dataclass(frozen=True)
class _Fault:
    code: str
    path: str
    text: str
    span: Span | None = None


def _faults(program: Program, adapter: Adapter, frame: _Frame, sites: Mapping[str, Site]) -> list[_Fault]:
    """What of an adapter does not fit the names and shapes of one model."""
    out: list[_Fault] = []
    replaced = _replaced(program)
    for low in adapter.parts.values():
        name = f"{low.path}.weight"
        here = frame.find(name)
        if here is None:
            out += _missing(frame, name, low.path, replaced)
            continue
        site = sites.get(here[0].removesuffix(".weight"))
        if site is None:
            out.append(_Fault("S0784", low.path, f"`{low.path}` is no linear layer, convolution or embedding here"))
            continue
        if not here[1].why and (text := _unlike(program, low, site, here[1].shape)):
            out.append(_Fault("S0785", low.path, text))
    for key, load in adapter.whole.items():
        here = frame.find(key)
        if here is None:
            out += _missing(frame, key, key, replaced)
        elif not here[1].why and tuple(load.shape) != here[1].shape:
            out.append(_Fault("S0785", key, f"`{key}` is {list(load.shape)} in the adapter and {list(here[1].shape)} in the model"))
    return out


def _missing(frame: _Frame, name: str, path: str, replaced: Mapping[str, Any]) -> list[_Fault]:
    """A tensor that is not in the program: no fault where a statement dropped it, one where it was replaced or never there."""
    if name in replaced:
        gone = replaced[name]
        return [_Fault("S0784", path, f"`{path}` was {gone.how}", gone.origin.span)]
    if name in frame.known:
        return []
    return [_Fault("S0784", path, f"the model has no `{path}`")]


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
    geometry = _geometry(program, site, shape)
    if low.embedding != (geometry.op == "embedding"):
        return f"`{low.path}` is {'an embedding' if low.embedding else 'a linear map'} in the adapter and {'no embedding' if low.embedding else 'an embedding'} here"
    want = factor_shapes(geometry, low.rank)
    have = (tuple(low.a.shape), tuple(low.b.shape))
    if geometry.op == "conv" and (geometry.groups > 1 or any(d != 1 for d in geometry.dilation)):
        return f"`{low.path}` is a convolution in groups or with gaps, for which such files hold another change than one of its kernel"
    if have != want:
        return f"`{low.path}` is [{geometry.out}, {geometry.inp}] here and [{have[1][0]}, {have[0][1]}] in the adapter"
    if low.magnitude is not None and int(np.prod(low.magnitude.shape)) != geometry.out:
        return f"the magnitude of `{low.path}` has {int(np.prod(low.magnitude.shape))} entries for {geometry.out} outputs"
    return ""


def _geometry(program: Program, site: Site, shape: Sequence[int]) -> Geometry:
    """The geometry of a site whose stored weight has (or had) this shape."""
    graph, node = calls_of(program, site)[0]
    return geometry_of(site, tuple(shape), call_config(program, graph, node))


def _refuse(adapter: Adapter, problems: Sequence[_Fault], span: Span, paths: Sequence[str]) -> SurgeryError:
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


def _likely(first: _Fault, paths: Sequence[str]) -> list[str]:
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


def _stuck(adapter: Adapter, path: str, why: str, span: Span) -> SurgeryError:
    return fail(
        "S0789", f"{adapter.name} cannot be carried over to `{path}`: {why}", span, "merged here",
        help="merge the adapter above the statement that changed the model: it is cut along, or folded first where that takes no adapters",
    )  # fmt: skip


def _named_otherwise(program: Program, adapter: Adapter, span: Span) -> list[Any]:
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
    from surgery.core.diagnostics import Severity

    return [
        error(
            "S0788", f"{adapter.name} was trained on {what}, and the model is {sorted(names)[0]!r}", span, "merged here", severity=Severity.WARNING,
            notes=("names and shapes fit",) if not theirs else ("names and shapes fit; the stored tensors of the two differ in layout or type",),
            help="if the two are the same weights under two names, go on",
        )
    ]  # fmt: skip


# ------------------------------------------------------------------ one part


def _placed(program: Program, adapter: Adapter, low: Low, site: Site, was: Ancestor, span: Span) -> Placed:
    if was.why:
        raise _stuck(adapter, low.path, was.why, span)
    chosen: Variant = variant(adapter, low, span)
    weight = program.weights[program.aliases.get(site.weight, site.weight)]
    now = _geometry(program, site, weight.shape)
    then = _geometry(program, site, was.shape)
    tensors = {n: cast(e, "float32") for n, e in chosen.tensors.items()}
    part = Placed(
        site,
        then,
        chosen.method,
        tensors,
        weight,
        None if low.shift is None else cast(low.shift, "float32"),
        was.source,
        was.source is weight,
    )
    if was.source is None and not was.cut:
        part = replace(part, origin=weight, direct=True)
    if not was.cut:
        return part
    if chosen.method.rebase(then):
        plain_ = part.low()
        if plain_ is None:
            raise _stuck(adapter, low.path, "its start comes from the weight before the cut, which is not stored any more", span)
        a, b, scale = plain_
        part = replace(part, method=plain(a.shape[0], scale, adapter.dropout), tensors={"A": a, "B": b})
    follow = follow_delta(part.method, then, Around(was.kept, (), then.groups))
    if isinstance(follow, str):
        raise _stuck(adapter, low.path, follow, span)
    given: dict[str, Expr] = dict(part.tensors)
    if follow.rewrite:
        if was.source is None:
            raise _stuck(
                adapter,
                low.path,
                f"its {next(iter(follow.rewrite))} depends on the weight before the cut, which is not stored any more",
                span,
            )
        given |= {n: make({**part.tensors, "weight": was.source}) for n, make in follow.rewrite.items()}
    cut: dict[str, Expr] = {}
    for name, expr in given.items():
        for axis, mask in enumerate(follow.tensors.get(name, ())):
            expr = expr if mask is None else select(expr, axis, to_ranges(mask))
        cut[name] = expr
    shift = part.shift
    if shift is not None and was.kept[site.out_axis] is not None:
        shift = select(shift, 0, to_ranges(was.kept[site.out_axis]))  # type: ignore[arg-type]
    return replace(part, geometry=now, tensors=cut, shift=shift, direct=False)


# ------------------------------------------------------------------ selectors


def within_selection(program: Program, placed: Placed, sites: Iterable[Site]) -> list[Placed]:
    """The part itself where a selector names it whole, its slices where one names some of what it stands on, else nothing."""
    from surgery.passes.resolve import within

    chosen = list(sites)
    site = placed.site
    if any(
        site.role == s.role or within(site.role, s.role) or (s.path == site.path and s.weight == site.weight and not s.rows) for s in chosen
    ):
        return [placed]
    slices = [s for s in program.anatomy.sites if s.weight == site.weight and s.rows and s.path == site.path]
    some = [s for s in slices if any(s.role == c.role or within(s.role, c.role) for c in chosen)]
    if not some:
        return [placed] if any(c.is_region and site.weight in c.parameters for c in chosen) and not slices else []
    return [placed] if len(some) == len(slices) else [_slice(program, placed, s) for s in some]


def _slice(program: Program, placed: Placed, site: Site) -> Placed:
    """The part for some rows of the weight that it stands on."""
    low = placed.low() if placed.method.rebase(placed.geometry) else None
    if low is not None:
        a, b, scale = low
        placed = replace(
            placed, method=plain(a.shape[0], scale, float(getattr(placed.method, "dropout", 0.0))), tensors={"A": a, "B": b}, direct=False
        )
    tensors = {n: e if n == "A" else select(e, 0, tuple(site.rows)) for n, e in placed.tensors.items()}
    shift = None if placed.shift is None else select(placed.shift, 0, tuple(site.rows))
    shape = program.weights[program.aliases.get(site.weight, site.weight)].shape
    return replace(placed, site=site, geometry=_geometry(program, site, shape), tensors=tensors, shift=shift)
