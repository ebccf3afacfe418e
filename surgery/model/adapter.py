"""Adapters as files: the folder that peft writes, read from its config and its tensor headers alone.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. What it says is put into one form here: low-rank parts by
the path of their module in the base model, weights that are a function of themselves, and tensors of the base that were trained whole.
Which methods those parts are, and where they go in a program, is decided in ``passes``; nothing is read of the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model.adapter_config import TASK, flags, known, number
from surgery.model.adapter_forms import Dense, Kind
from surgery.model.adapter_keys import LOW, Key, key_of, other_key
from surgery.model.adapter_targets import left_out
from surgery.model.adapter_tokens import VirtualTokens, read_tokens
from surgery.model.checkpoint_headers import TensorHeader, read_header
from surgery.model.checkpoint_refs import hub_cache
from surgery.model.checkpoint_shards import refuse_pickle
from surgery.model.contenthash import Hashing
from surgery.model.weights import Expr, Load, is_float, loads

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
RECORD = "surgery-export.json"


@dataclass(frozen=True)
class Low:
    """One low-rank part: module ``path`` of the base, ``A`` and ``B`` as stored, ``scale`` in front of their product.

    ``A [r, in]``, ``B [out, r]``; of a convolution with the kernel behind, of an embedding ``A [r, rows]``, ``B [width, r]``.
    ``magnitude [out]`` is there for weight-decomposed parts, ``shift [out]`` where ``B`` has a bias. ``made`` says that the factors are computed from
    what another kind of folder stores: flat for convolutions, too; ``shared`` that ``A`` is as long as the longest layer. ``experts`` counts those of a bare parameter ``[experts, ., .]`` in the module:
    ``A [r experts, .]``, ``B [., r experts]``; a ``path`` that ends in ``.base_layer`` (several times) is that of an inner one of several.
    """

    path: str
    a: Expr
    b: Expr
    rank: int
    scale: float
    embedding: bool = False
    magnitude: Load | None = None
    shift: Load | None = None
    made: bool = False
    shared: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows of the table of module ``path`` that were trained: row ``indices[i]`` is row ``i`` of ``stored [rows, width]``."""

    path: str
    stored: Load
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """One opened folder.

    ``flags`` say which variant its parts are (``use_rslora``, ``use_dora``, ``init_lora_weights``), ``whole`` are tensors of the base by
    name that it replaces, ``copies`` those of them that are expected to equal the base's. ``base`` is the name of the base as the folder
    has it, ``record`` what surgery wrote beside it (base model and its hash), if it did. ``left_out`` is a layer that the file has tensors for and the config
    none, with the field that says so.
    """

    name: str
    folder: Path
    span: Span
    flags: Mapping[str, Any]
    parts: Mapping[str, Low]
    whole: Mapping[str, Load]
    copies: frozenset[str]
    dropout: float
    base: str
    record: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Dense] = field(default_factory=dict)
    tokens: VirtualTokens | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    left_out: tuple[str, str] = ("", "")

    def stored(self) -> list[Load]:
        """The tensors of the parts as the file has them, each once."""
        found = {
            load.identity: load for low in self.parts.values() for e in (low.a, low.b, low.magnitude, low.shift) if e is not None for load in loads(e)
        }  # fmt: skip
        found |= {load.identity: load for part in self.dense.values() for load in (*part.tensors, *(part.bias_tensors or ()))} | {
            r.stored.identity: r.stored for r in self.rows.values()
        }
        tokens = {load.identity: load for e in (self.tokens.expressions if self.tokens else ()) for load in loads(e)}
        return [*found.values(), *tokens.values()]

    def digest(self) -> str:
        """sha256 over both files: what a lock keeps."""
        files = [self.folder / CONFIG, self.folder / TENSORS]
        found = Hashing(files).result()
        return "+".join(found[f] for f in files)


def open_adapter(ref: str, name: str, base: Path, span: Span, task: int | None = None) -> Adapter:
    """Opens the folder ``ref`` (beside the spec, in the working directory, or of the local hub cache) under ``name``, for one ``task`` of those
    that it knows where it knows several.

    Raises S0781 (nothing there, or not readable), S0705 (a pickle), S0782 (a kind of adapter that is not known) and S0783 (config and tensors that
    do not go together), S07xx for a damaged safetensors file.
    """
    folder = _folder(ref, base, span)
    config = _config(folder, ref, span)
    kind = known(config, name, span, task)
    config = config if task is None else {**config, TASK: task}
    tensors = _tensors(folder, ref, span)
    base_name, record = str(config.get("base_model_name_or_path") or ""), _record(folder)
    if isinstance(kind, str):
        tokens, saved = read_tokens(kind, config, tensors.values(), lambda message, help="save the adapter again, whole": fail(
            "S0783", f"{name} cannot be read: {message}", span, "opened here", help=help
        ))  # fmt: skip
        return Adapter(name, folder, span, {}, {}, saved, frozenset(), 0.0, base_name, record, tokens=tokens)
    reader = _Reader(name, config, span, kind)
    for header in tensors.values():
        reader.take(header)
    parts, dense = reader.parts()
    rows = reader.rows()
    out = left_out(config, [*(p for p, low in parts.items() if not low.experts), *dense], reader._because)
    if not parts and not dense and not reader.whole and not rows:
        raise fail("S0783", f"{name} holds no tensor", span, "opened here", notes=(f"folder: {folder}",), help="save the adapter again")
    return Adapter(
        name, folder, span, {} if kind else flags(config), parts, reader.whole, frozenset(reader.copies),
        number(config, "vera_dropout" if kind and kind.name == "VeRA" else "lora_dropout", 0.0, name, span),
        base_name, record, dense, rows=rows, left_out=out, bare=() if kind else tuple(config.get("target_parameters") or ()),
    )  # fmt: skip


# ------------------------------------------------------------------ files


def _folder(ref: str, base: Path, span: Span) -> Path:
    path = Path(ref).expanduser()
    for place in (path,) if path.is_absolute() else (base / path, path):
        if place.is_dir():
            return place
    cached = _cached(ref)
    if cached is not None:
        return cached
    raise fail(
        "S0781", f"there is no adapter {ref!r} here", span, "opened here", exit_code=2, notes=(f"looked for {base / path}, and in the hub cache",),
        help=f"name a folder that holds {CONFIG} and {TENSORS}; nothing is downloaded",
    )  # fmt: skip


def _cached(ref: str) -> Path | None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", ref):
        return None
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = ref.partition("@")
    found = try_to_load_from_cache(name, CONFIG, cache_dir=hub_cache(), revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path, ref: str, span: Span) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        more = f"{ref} has a config.json: open it as a model, `checkpoint name = load(...)`" if (folder / "config.json").is_file() else ""
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        if inside:
            named = ", ".join(f'`load("{ref}/{n}")`' for n in inside[:4])
            more = f"it holds {'another adapter' if len(inside) == 1 else 'several adapters'}: {named}"
        raise fail(
            "S0781", f"there is no {CONFIG} in {ref}", span, "opened here", exit_code=2, notes=(f"folder: {folder}",),
            help=more or "name the folder that peft's `save_pretrained` wrote",
        ) from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as exc:
        why = str(getattr(exc, "strerror", None) or exc)
        raise fail(
            "S0781", f"{CONFIG} of {ref} cannot be read: {why}", span, "opened here", exit_code=2, notes=(f"file: {path}",),
            help="fetch it again from where the adapter came",
        ) from None  # fmt: skip
    if not isinstance(found, dict):
        raise fail("S0781", f"{CONFIG} of {ref} is not a JSON object", span, "opened here", exit_code=2, help="fetch it again")
    return found


def _tensors(folder: Path, ref: str, span: Span) -> dict[str, TensorHeader]:
    path = folder / TENSORS
    if path.is_file():
        return read_header(path, span).tensors
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (folder / name).is_file():
            raise refuse_pickle(folder / name, span)
    raise fail(
        "S0781", f"there is no {TENSORS} in {ref}", span, "opened here", exit_code=2, notes=(f"folder: {folder}",),
        help="save the adapter with safetensors, which is what peft does by default",
    )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    """What surgery said of the base when it wrote the folder; nothing where something else wrote it."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    base = found.get("base") if isinstance(found, dict) else None
    return dict(base) if isinstance(base, dict) else {}


# ------------------------------------------------------------------ tensors


class _Reader:
    """Collects the tensors of a file by module, and pairs them."""

    def __init__(self, name: str, config: Mapping[str, Any], span: Span, kind: Kind | None = None) -> None:
        self.name, self.config, self.span, self.kind = name, config, span, kind
        self.shared: dict[str, TensorHeader] = {}
        self.found: dict[str, dict[str, TensorHeader]] = {}
        self.whole: dict[str, Load] = {}
        self.copies: set[str] = set()
        self.tables: dict[str, TensorHeader] = {}

    def fault(self, message: str, help: str = "save the adapter again, whole") -> SurgeryError:
        return fail("S0783", message, self.span, "opened here", help=help)

    def take(self, header: TensorHeader) -> None:
        if ".original_module." in header.key:
            return  # the base's own, which peft saves beside a module that was trained whole and never reads
        key: Key = key_of(header.key) if self.kind is None else other_key(header.key, self.kind)
        if key.problem:
            raise fail("S0782", f"{self.name} has {key.problem}", self.span, "opened here", notes=(f"tensor: {header.key}",), help=key.help)
        if key.role == "rows":
            self.tables[key.path] = header
            return
        if key.role == "shared":
            self.shared[key.path] = header
            return
        if key.role in (LOW if self.kind is None else self.kind.roles.values()):
            mine = self.found.setdefault(key.path, {})
            if self.kind is None and not is_float(header.dtype):
                raise self.fault(f"`{key.role}` of `{key.path}` of {self.name} is {header.dtype}, where a trained factor is expected")
            if key.role in mine:
                raise self.fault(f"{self.name} has two tensors for `{key.role}` of `{key.path}`", "save one adapter a folder")
            mine[key.role] = header
            return
        self.whole[key.path] = header.load()
        if key.role == "copy":
            self.copies.add(key.path)

    def parts(self) -> tuple[dict[str, Low], dict[str, Dense]]:
        """Low-rank parts, and weights that are a function of themselves, by path."""
        if self.kind is None:
            return {path: self._part(path, roles) for path, roles in self.found.items()}, {}
        low: dict[str, Low] = {}
        dense: dict[str, Dense] = {}
        for path, roles in self.found.items():
            if len(roles) > 1 and all(0 in h.shape for h in roles.values()):
                continue  # a rank that was pruned to nothing
            made = self.kind.read(path, roles, self.config, self.shared, self._because)
            if isinstance(made, Dense):
                dense[path] = made
            else:
                low[path] = Low(path, made.a, made.b, made.rank, made.scale, made=True, shared=made.shared)
        return low, dense

    def rows(self) -> dict[str, Rows]:
        """Rows of tables that were trained one by one, by path."""
        return {path: Rows(path, header.load(), self._indices(path, header)) for path, header in self.tables.items()}

    def _indices(self, path: str, header: TensorHeader) -> tuple[int, ...]:
        said = self.config.get("token_indices") or self.config.get("trainable_token_indices")
        if isinstance(said, Mapping):
            said = next((v for k, v in said.items() if path == k or path.endswith(f".{k}")), None)
        fine = isinstance(said, list) and all(type(i) is int and i >= 0 for i in said) and len(set(said)) == len(said)
        if not fine or len(header.shape) != 2 or header.shape[0] != len(said or ()):
            raise self.fault(
                f"`{path}` of {self.name} has {header.shape[0] if header.shape else 0} trained rows, and its config names {len(said or ()) if fine else 'no list of them'}",
                "correct `token_indices` or `trainable_token_indices`",
            )
        return tuple(said or ())

    def _because(self, message: str, help: str = "save the adapter again, whole") -> SurgeryError:
        return self.fault(f"{self.name} cannot be read: {message}", help)

    def _part(self, path: str, roles: Mapping[str, TensorHeader]) -> Low:
        embedding = "embedding_A" in roles or "embedding_B" in roles
        first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        missing = [r for r in (first, second) if r not in roles]
        if missing or (embedding and ("A" in roles or "B" in roles)):
            raise self.fault(f"`{path}` of {self.name} has no `lora_{missing[0] if missing else first}`")
        a, b = roles[first], roles[second]
        rank = int(self._pattern("rank_pattern", path, number(self.config, "r", 8, self.name, self.span)))
        alpha = self._pattern("alpha_pattern", path, number(self.config, "lora_alpha", 8, self.name, self.span))
        if len(a.shape) < 2 or len(a.shape) != len(b.shape) or 0 in (*a.shape, *b.shape):
            raise self.fault(
                f"`{path}` of {self.name} has the factors {list(a.shape)} and {list(b.shape)}",
                "a sharded training saved pieces: gather the parameters before saving",
            )
        bare = bool(self.config.get("target_parameters")) and len(a.shape) == 2 and rank > 0 and a.shape[0] % rank == 0
        experts = a.shape[0] // rank if bare and (a.shape[0] > rank or path.endswith(".base_layer")) else 0
        if path.endswith(".base_layer") and not experts:
            raise self.fault(
                f"`{path}` of {self.name} has factors for a bare parameter that its config does not name (`target_parameters`)"
            )
        if experts and b.shape[1] != a.shape[0]:
            raise self.fault(f"`{path}` of {self.name} has the factors {list(a.shape)} and {list(b.shape)}")
        if rank < 1 or (a.shape[0] != rank and not experts):
            raise self.fault(
                f"`{path}` of {self.name} has rank {rank} by its config and {a.shape[0]} by its tensor", "correct `r` or `rank_pattern`"
            )
        if bool(self.config.get("use_dora")) != ("magnitude" in roles):
            which = (
                "no magnitude, and its config says `use_dora`"
                if self.config.get("use_dora")
                else "a magnitude, and its config does not say `use_dora`"
            )
            raise self.fault(f"`{path}` of {self.name} has {which}")
        if "shift" in roles and not self.config.get("lora_bias"):
            raise self.fault(
                f"`{path}` of {self.name} has a bias behind its factors, and its config has no `lora_bias`", "correct `lora_bias`"
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        load = {role: roles[role].load() for role in ("magnitude", "shift") if role in roles}
        return Low(path, a.load(), b.load(), rank, scale, embedding, load.get("magnitude"), load.get("shift"), experts=experts)

    def _pattern(self, field: str, path: str, default: float) -> float:
        """The value of the first pattern that the end of a path matches, as peft looks it up."""
        table = self.config.get(field) or {}
        if not isinstance(table, Mapping):
            raise self.fault(f"`{field}` of {self.name} is not a table", "write it as {pattern: number}")
        for pattern in table:
            try:
                match = re.match(rf"(.*\.)?({pattern})$", path)
            except re.error as exc:
                raise self.fault(
                    f"`{field}` of {self.name} has a pattern that cannot be read: {pattern!r} ({exc})", "correct the pattern"
                ) from None
            if match:
                return number(table, pattern, default, self.name, self.span)
        return default
