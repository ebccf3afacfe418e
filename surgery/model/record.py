"""A program as plain data and back: what an artifact's manifest says besides hashes.

``record_of`` gives JSON-able data with the graph under ``graph``. Weights are not in it: an artifact keeps them in safetensors
files, and a program read back has ``Load`` expressions on those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import NodeRef, Site
from surgery.core.source import NOWHERE, Source, Span, portable
from surgery.model import graphjson, past, pytree
from surgery.model.program import Attachment, Gone, Journal, ModelInfo, Origin, Program, Signature
from surgery.model.weights import Weights

Methods = Callable[[str, str], "type[Method]"]
"""Finds a method class by verb and name; KeyError when there is none."""


def constant_names(root: torch.nn.Module) -> list[str]:
    """Full names of the buffers that are no part of the state dict, sorted."""
    found = []
    for path, module in root.named_modules():
        found += [f"{path}.{n}" if path else n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
    return sorted(found)


def record_of(program: Program, *, dtype: str = "") -> dict[str, Any]:
    """The program as data. ``dtype`` overrides the dtype of the model that its tensors get when they are written."""
    sources: dict[str, str] = {}
    return {
        "info": {**dataclasses.asdict(program.info), "ref": portable(program.info.ref)},
        "dtype": dtype or program.info.dtype,
        "signature": {
            "parameters": list(program.signature.parameters), "in": program.signature.in_spec, "out": program.signature.out_spec,
            "constants": dict(program.signature.constants),
            "symbols": {k: list(v) for k, v in program.signature.symbols.items()},
        },
        "aliases": dict(program.aliases),
        "frozen": sorted(program.frozen),
        "attachments": [_attachment(a, sources) for a in program.attachments],
        "schedules": [{"method": _method(m), "targets": list(targets)} for m, targets in program.schedules],
        "named": {label: list(roles) for label, roles in program.named.items()},
        "gone": [_gone(g, sources) for g in program.gone.values()],
        "past": past.as_json(program),
        "journal": {key: [_origin(o, sources) for o in origins] for key, origins in program.journal.entries.items()},
        "sources": sources,
        "graph": graphjson.dump(program.graph),
    }  # fmt: skip


def signature_of(record: Mapping[str, Any]) -> Signature:
    """The call signature of a record; S0826 or S0829 when its trees are not well formed."""
    data = record["signature"]
    names = tuple(data["parameters"])
    if any(not isinstance(n, str) or not n.isidentifier() for n in names):
        raise graphjson.malformed("a parameter of its signature is not a name")
    symbols = {str(k): (str(v[0]), int(v[1]), int(v[2])) for k, v in data["symbols"].items()}
    return Signature(names, pytree.check(data["in"]), pytree.check(data["out"]), dict(data["constants"]), symbols)


def program_of(record: Mapping[str, Any], weights: Weights, methods: Methods, *, resolver: Any = None) -> Program:
    """The program behind a record. Raises S0834 when a method that it was made with is not installed."""
    sources = {name: Source(name, text) for name, text in record["sources"].items()}
    info = record["info"]
    known = {f.name for f in dataclasses.fields(ModelInfo)}
    journal = Journal()
    for key, origins in record["journal"].items():
        journal.entries[key] = [_read_origin(o, sources) for o in origins]
    return Program(
        graph=graphjson.load(record["graph"], modules=resolver), signature=signature_of(record), weights=weights,
        info=ModelInfo(**{k: _tuples(v) if k == "notes" else v for k, v in info.items() if k in known}), aliases=dict(record["aliases"]), journal=journal,
        attachments=[_read_attachment(a, sources, methods) for a in record["attachments"]], frozen=set(record["frozen"]),
        schedules=[(read_method(s["method"], methods), tuple(s["targets"])) for s in record["schedules"]],
        named={label: tuple(roles) for label, roles in (record.get("named") or {}).items()},
        gone={g.site.role: g for g in (_read_gone(data, sources) for data in record.get("gone") or ())},
        past=past.of_json(record.get("past")),
    )  # fmt: skip


# --- parts ------------------------------------------------------------------------------------------------------------------


def _method(method: Method) -> dict[str, Any]:
    return {"verb": method.verb, "name": method.name, "version": method.version, "params": _plain(method.params())}


def read_method(data: Mapping[str, Any], methods: Methods) -> Method:
    """The method of a record's entry. Raises S0834 when it is not installed, newer than this one, or its parameters do not fit."""
    label = f"{data['verb']} {data['name']}"
    try:
        cls = methods(str(data["verb"]), str(data["name"]))
    except KeyError:
        raise fail(
            "S0834",
            f"the artifact was made with the method {label!r}, which is not installed",
            help="install the package that has the method",
        ) from None
    if data["version"] > cls.version:
        raise fail(
            "S0834", f"the artifact was made with version {data['version']} of {label!r}, this surgery has version {cls.version}",
            help="install the surgery version that wrote the artifact or a newer one",
        )  # fmt: skip
    try:
        return cls(**{k: _tuples(v) for k, v in data["params"].items()})
    except (TypeError, ValueError) as err:
        raise fail(
            "S0834", f"the parameters of {label!r} in the artifact do not fit: {err}", help="emit the artifact again from its spec"
        ) from err


def _attachment(a: Attachment, sources: dict[str, str]) -> dict[str, Any]:
    return {
        "name": a.name, "method": _method(a.method), "site": _site(a.site), "module": a.module, "node": list(a.node),
        "tensors": list(a.tensors), "origin": _origin(a.origin, sources),
    }  # fmt: skip


def _read_attachment(data: Mapping[str, Any], sources: Mapping[str, Source], methods: Methods) -> Attachment:
    return Attachment(
        name=data["name"], method=read_method(data["method"], methods), site=_read_site(data["site"]), module=data["module"],
        node=NodeRef(*data["node"]), tensors=tuple(data["tensors"]), origin=_read_origin(data["origin"], sources),
    )  # fmt: skip


def _gone(gone: Gone, sources: dict[str, str]) -> dict[str, Any]:
    """Of the part only what a message and a selector need: graph and weights have nothing of it."""
    site = {k: v for k in ("role", "op", "stack", "layer", "facts") if (v := _plain(getattr(gone.site, k))) not in ("", None, {})}
    return {"site": site, "origin": _origin(gone.origin, sources), "how": gone.how, "heir": gone.heir}


def _read_gone(data: Mapping[str, Any], sources: Mapping[str, Source]) -> Gone:
    site = Site(**{"path": "", **{k: v for k, v in data["site"].items() if k in ("role", "op", "stack", "layer", "facts")}})
    return Gone(site, _read_origin(data["origin"], sources), str(data["how"]), str(data["heir"]))


def _site(site: Site) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    data = {}
    for f in dataclasses.fields(site):
        value = getattr(site, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default:
            data[f.name] = _plain(value)
    return data


_REFS = ("input", "output", "residual", "norm_output")


def _read_site(data: Mapping[str, Any]) -> Site:
    known = {f.name for f in dataclasses.fields(Site)}
    given: dict[str, Any] = {k: _tuples(v) for k, v in data.items() if k in known and k != "facts"}
    for name in _REFS:
        if given.get(name) is not None:
            given[name] = NodeRef(*given[name])
    given["calls"] = tuple(NodeRef(*c) for c in given.get("calls", ()))
    return Site(**given, facts=dict(data.get("facts", {})))


def _origin(origin: Origin, sources: dict[str, str]) -> dict[str, Any]:
    data: dict[str, Any] = {k: getattr(origin, k) for k in ("verb", "method", "note") if getattr(origin, k)}
    span = origin.span
    if span is not NOWHERE and span.source.text:
        name = PurePath(span.source.name).name
        while sources.setdefault(name, span.source.text) != span.source.text:
            name += "'"
        data["span"] = [name, span.start, span.end]
    return data


def _read_origin(data: Mapping[str, Any], sources: Mapping[str, Source]) -> Origin:
    span = NOWHERE
    if "span" in data:
        name, start, end = data["span"]
        span = Span(sources[name], int(start), int(end))
    return Origin(span, data.get("verb", ""), data.get("method", ""), data.get("note", ""))


def _plain(value: Any) -> Any:
    """JSON-able data of a value made of plain parts; other objects become their text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
