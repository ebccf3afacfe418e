"""Everything that a spec can call by name: methods, backends, checks, quantities, data sources. No torch.

Methods come from ``catalogue.json``, which ``python -m surgery.dev generate`` writes from the method files; the rest are
the tables below, because they are part of the language and not of a folder of plug-ins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from surgery.core.method import MethodInfo, ParamInfo

EDITION_VERBS = ("adapt", "insert", "prune", "share", "convert", "replace", "factorize", "skip", "freeze", "unfreeze", "fold")
"""The verbs of operations. ``train``, ``merge``, ``measure`` and ``select`` call methods too, in statements of their own."""

METHOD_VERBS = (*EDITION_VERBS, "merge", "train", "measure", "select")

COUNT, BYTES, SHARE = "count", "bytes", "share"


@dataclass(frozen=True)
class Entry:
    """Something with parameters that is not a method: a backend, a check, a data source, a loader."""

    name: str
    summary: str
    params: tuple[ParamInfo, ...] = ()
    positional: tuple[str, ...] = ()

    def param(self, name: str) -> ParamInfo | None:
        return next((p for p in self.params if p.name == name), None)


@dataclass(frozen=True)
class Quantity:
    """What ``expect`` compares: its dimension and what a percentage of it means."""

    name: str
    dimension: str
    summary: str


def _p(name: str, type: str, help: str, default: Any = None, **more: Any) -> ParamInfo:
    return ParamInfo(name, type, help, default=default, **more)


_DTYPE = _p("dtype", "name", "type of the stored weights; without it each tensor keeps its own", choices=("fp32", "bf16", "fp16"))
_TARGET = _p("target", "name", "processor that the result is for", "cpu", choices=("cpu", "cuda"))


def _table(*entries: Any) -> dict[str, Any]:
    return {e.name: e for e in entries}


BACKENDS: dict[str, Entry] = _table(
    Entry("torch", "a folder that `surgery.load` opens as an nn.Module with the original signature", (_DTYPE,)),
    Entry("transformers", "a plain checkpoint for `from_pretrained`", (_DTYPE,)),
    Entry(
        "peft",
        "an adapter folder for `PeftModel.from_pretrained`",
        (_DTYPE, _p("rank", "int", "rank of changes that have to be factored; without it the rank that their method has", min=1)),
    ),
    Entry(
        "onnx",
        "an ONNX graph with dynamic batch and sequence",
        (
            _p(
                "opset",
                "int",
                "version of the ONNX operator set; what it lacks and what is not installed is said by `compile`",
                20,
                min=1,
                max=99,
            ),
            _p("precision", "name", "type of weights and arithmetic", "fp32", choices=("fp32", "fp16", "bf16", "int8")),
            _TARGET,
            _p("cache", "bool", "keys and values of earlier steps as inputs and outputs; unsaid, where the model has them", None),
            _p(
                "live",
                "bool",
                "adapters that stay tensors of their own, exchanged in a session: all, or a list of names",
                False,
                also=("list",),
            ),
            _p(
                "optimize",
                "name",
                "all fuses the graph, none leaves every operation as the model states it",
                "all",
                choices=("all", "none"),
            ),
        ),
    ),
    Entry(
        "pt2",
        "an AOTInductor package for serving, compiled for the processor of this machine",
        (
            _p("precision", "name", "type of weights and arithmetic", "fp32", choices=("fp32", "fp16", "bf16")),
            _TARGET,
            _p("cache", "bool", "keys and values of earlier steps as inputs and outputs; unsaid, where the model has them", None),
            _p(
                "optimize",
                "name",
                "all fuses the graph, none leaves every operation as the model states it",
                "all",
                choices=("all", "none"),
            ),
        ),
    ),
    Entry(
        "report",
        "one self-contained HTML page",
        (
            _p(
                "timings",
                "bool",
                "also run the model before and after and the ONNX files emitted above it; the page then differs between runs",
                False,
            ),
        ),
    ),
)

CHECKS: dict[str, Entry] = _table(
    Entry(
        "same_output",
        "the output equals the original's at init, or the unfolded model's after folding",
        (_p("at", "name", "when the outputs are compared", "init", choices=("init", "fold")),),
    ),
    Entry(
        "runs",
        "one forward pass at this size gives finite outputs",
        (
            _p("batch", "int", "sequences in the batch", 2, min=1, max=4096),
            _p("length", "int", "tokens, frames or pixels a side", 16, min=1, max=1 << 20, unit="tokens"),
        ),
    ),
    Entry("locked", "the lock file beside the spec says the same as this run"),
)

QUANTITIES: dict[str, Quantity] = _table(
    Quantity("params", COUNT, "parameters, tied tensors once"),
    Quantity("trainable", COUNT, "parameters that train"),
    Quantity("active_params", COUNT, "parameters that one token uses"),
    Quantity("bytes", BYTES, "bytes of all parameters as stored"),
    Quantity("flops", COUNT, "floating-point operations per token"),
    Quantity("layers", COUNT, "layers of the stacks"),
    Quantity("heads", COUNT, "attention heads"),
    Quantity("sparsity", SHARE, "share of weights that are zero"),
    Quantity("sites", COUNT, "sites that the selector names"),
)

_READING = (
    _p("samples", "int", "how many are read; without it all", min=1, max=10**9),
    _p(
        "length",
        "int",
        "tokens a sample is cut to; without it 512, or what the model has positions for",
        512,
        min=1,
        max=1 << 20,
        unit="tokens",
    ),
    _p("seed", "int", "seed of the choice and the order of samples", 0, min=0, max=2**63 - 1),
    _p("batch", "int", "samples that run together", 8, min=1, max=1 << 16),
)
_PATH = ParamInfo("path", "str", "file, relative to the spec", required=True)

SOURCES: dict[str, Entry] = _table(
    Entry("lines", "a text file, one sample a line", (_PATH, *_READING), ("path",)),
    Entry(
        "jsonl",
        "a file of JSON objects, one a line",
        (_PATH, _p("field", "str", "key that holds the text", "text"), *_READING),
        ("path",),
    ),
    Entry(
        "tensors",
        "a safetensors file of model inputs, the first axis counts samples",
        (_PATH, *(p for p in _READING if p.name != "length")),
        ("path",),
    ),
)

_REF = ParamInfo("ref", "str", "folder or model reference", required=True)

LOADERS: dict[str, Entry] = _table(Entry("load", "a folder or reference", (_REF,), ("ref",)))

ADAPTER_LOADERS: dict[str, Entry] = _table(
    Entry(
        "load", "a folder or reference",
        (_REF, ParamInfo("task", "int", "of an adapter that knows several tasks: which one, counted from 0", min=0)), ("ref",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Catalogue:
    """The methods by (verb, name), sorted."""

    methods: dict[tuple[str, str], MethodInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, infos: Iterable[MethodInfo]) -> Catalogue:
        return cls({(m.verb, m.name): m for m in sorted(infos, key=lambda m: (m.verb, m.name))})

    def get(self, verb: str, name: str) -> MethodInfo | None:
        return self.methods.get((verb, name))

    @cached_property
    def _by_verb(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for verb, name in self.methods:
            found.setdefault(verb, []).append(name)
        return found

    def names(self, verb: str) -> list[str]:
        return self._by_verb.get(verb, [])

    def verbs_of(self, name: str) -> list[str]:
        """The verbs that have a method of this name."""
        return [v for v, n in self.methods if n == name]


def render(infos: Iterable[MethodInfo]) -> str:
    """The text of ``catalogue.json``."""
    records = [asdict(m) for m in sorted(infos, key=lambda m: (m.verb, m.name))]
    return json.dumps({"schema": "surgery.catalogue/1", "methods": records}, indent=1, ensure_ascii=False) + "\n"


def parse(text: str) -> Catalogue:
    """The catalogue from its JSON text. Raises ValueError or KeyError for a damaged file."""
    return Catalogue.of(_info(record) for record in json.loads(text)["methods"])


def _info(record: dict[str, Any]) -> MethodInfo:
    params = tuple(
        ParamInfo(**{**p, "choices": tuple(p["choices"]), "also": tuple(p.get("also", ())), "default": _frozen(p["default"])})
        for p in record["params"]
    )
    return MethodInfo(**{**record, "places": tuple(record["places"]), "params": params, "one_of": tuple(record.get("one_of", ()))})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


CATALOGUE_FILE = Path(__file__).with_name("catalogue.json")


@lru_cache(maxsize=1)
def load() -> Catalogue:
    """The packaged catalogue."""
    return parse(CATALOGUE_FILE.read_text("utf-8"))


load_catalogue = load
