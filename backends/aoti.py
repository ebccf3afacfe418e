"""Ahead-of-time compilation by torch: from an exported module to the bytes of a ``.pt2`` package, the same bytes every time.

Inductor writes C++, the compiler of this machine makes a shared library of it, and the package is a zip of the library and plain
JSON. Sources, which name folders of this machine, stay out of it. What is left that a build could vary in is fixed here: names of files, paths that
macros spell, symbols of the linker, and the number of threads (loops ask for it when they run).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgery.backends import pt2_ops
from surgery.backends.aoti_quick import quick
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span

EXTRA = "surgery.json"
"""The file in a package that holds our record: in the zip as ``data/extra/surgery.json``."""

NAME = "model"
"""What the generated files and the model in the package are called."""


def compiler() -> str | None:
    """The C++ compiler that inductor would use, ``$CXX`` first; None when it cannot be started."""
    wanted = os.environ.get("CXX") or "g++"
    found = shutil.which(wanted)
    if found is None:
        return None
    try:
        subprocess.run([found, "--version"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return found


def require_compiler(target: str = "cpu", span: Span | None = None) -> str:
    """The compiler's path. Raises S0890 when there is none, S0891 when the target is a processor that this machine does not have."""
    found = compiler()
    if found is None:
        raise fail(
            "S0890", f"emitting pt2 needs a C++ compiler, and `{os.environ.get('CXX') or 'g++'}` does not start", span, "asked for here", exit_code=2,
            help=["install one (`apt install g++`, `dnf install gcc-c++`), or name yours with CXX=...", 'or write `emit onnx to "....onnx"`, which needs none'],
        )  # fmt: skip
    if target == "cuda" and not torch.cuda.is_available():
        raise fail(
            "S0891", "`target = cuda` needs a CUDA device to compile on, and torch finds none", span, "asked for here", exit_code=2,
            help="emit on a machine that has one, or write `target = cpu`",
        )  # fmt: skip
    return found


_asked: list[threading.Thread] = []


def ask_ahead() -> None:
    """Starts to ask what vectors this processor has, which makes and loads small libraries: the answer is there when :func:`build` wants it."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if not _asked:
        _asked.append(threading.Thread(target=pick_vec_isa, name="vectors", daemon=True))
        _asked[0].start()


def build(
    module: torch.nn.Module,
    example: dict[str, Any],
    shapes: dict[str, Any],
    place: Path,
    options: dict[str, Any] | None = None,
    span: Span | None = None,
    python: list[str] | None = None,
) -> list[Path]:
    """Compiles a module that takes keyword arguments; ``place`` is an empty folder. Gives the files for :func:`package`.

    ``python`` is given the operations of ours that the package still calls. ``shapes``: for each keyword which axes are open, as ``torch.export`` takes it. Raises S0893 when the graph cannot be exported, S0892 when it cannot be
    compiled.
    """
    with quiet(), torch.no_grad(), _young():
        try:
            exported = pt2_ops.plain(torch.export.export(module, (), example, dynamic_shapes=shapes, strict=False))
        except Exception as exc:
            raise _failed(
                "S0893", "torch.export cannot express this model", exc, span, "write `emit torch` instead, or report the model's config"
            ) from exc
        if python is not None:
            python += pt2_ops.left(exported)
        try:
            with _settled(), quick() if example_device(example) == "cpu" else nullcontext(), pt2_ops.every_type():
                made = torch._inductor.aot_compile(
                    exported.module(check_guards=False),
                    (),
                    example,
                    options=known({**defaults(place, example_device(example)), **(options or {})}),
                )
        except Exception as exc:
            raise _failed(
                "S0892", "the compiler failed on the generated code", exc, span,
                "nothing was written; `emit onnx` needs no compiler. Please report this with the model's config and `g++ --version`",
            ) from exc  # fmt: skip
    files = [Path(f) for f in made if isinstance(f, str) and f]
    libraries = [f for f in files if f.suffix == ".so"]
    return libraries + [f for f in files if f.suffix not in (".so", ".cpp", ".h")]


def example_device(example: dict[str, Any]) -> str:
    """Where a package is for: the kind of device that its example lies on."""
    return next((leaf.device.type for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)), "cpu")


def defaults(place: Path, target: str = "cpu") -> dict[str, Any]:
    """Inductor's options: weights packed for the processor, constants computed ahead, no trace of this machine in what the compiler writes."""
    headers = Path(torch.__file__).parent
    # -s: no symbols that only debuggers read; they hold names of temporary files
    return {
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(place),
        "aot_inductor.model_name_for_generated_files": NAME,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.precompile_headers": False,
        "aot_inductor.force_mmap_weights": target == "cpu",  # behind the library and not through the linker, which copies them once more
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls kernels, which are compiled at -O3: runs as fast, compiles in two thirds
        "cpp.march": f"native -s -ffile-prefix-map={place}=. -ffile-prefix-map={headers}=torch",
        "size_asserts": False,  # their texts hold addresses of this process
        "alignment_asserts": False,
        "cpp.dynamic_threads": True,
        "freezing": True,
    }


def known(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this release of torch has: inductor's settings are private and come and go, and it refuses what it does not know."""
    has = torch._inductor.config.get_config_copy()
    return {name: value for name, value in options.items() if name in has}


@contextmanager
def _settled() -> Iterator[None]:
    """Random numbers (a marker in large packages) and autotuning start from the same state; the caches of inductor are not this run's."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    while _asked:
        _asked.pop().join()
    pick_vec_isa()  # asked with the usual flags, so that its answer is kept from run to run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _young() -> Iterator[None]:
    """The garbage collector looks at what is made in the block and not, again and again, at all that torch and the model hold already."""
    if gc.get_freeze_count():
        yield  # somebody else's; to thaw is to thaw everything
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def package(files: Sequence[Path], target: Path) -> None:
    """Writes the package without our record (:func:`mark`): a zip that is not compressed."""
    from torch.export.pt2_archive._package import package_pt2

    with target.open("w+b") as stream:
        package_pt2(stream, aoti_files={NAME: [str(f) for f in files]})


def mark(path: Path, extra: dict[str, Any]) -> None:
    """Adds our record to a package that has none yet. It is not compressed either, so that the owner's mark in it is found without opening the
    zip; what the package has already stays where it is, so that what was measured is what is kept."""
    text = json.dumps(extra, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/data/extra/{EXTRA}"), text)


def load(path: Path, threads: bool = True) -> Callable[..., Any]:
    """The package as a callable. It runs native code of the file: only for files that this run made or that the user names."""
    with quiet():
        made: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return made


def try_apart(path: Path, imports: Sequence[str] = (), span: Span | None = None) -> None:
    """Opens a package in a process of its own first, for kernels of a device whose driver may take the process with it. Raises S0894 when that fails."""
    code = "".join(f"import {name}\n" for name in ("sys", "torch", *imports)) + "torch._inductor.aoti_load_package(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    last = [line.strip()[:200] for line in done.stderr.splitlines() if line.strip()][-1:]
    raise fail(
        "S0894", f"the compiled package cannot be opened: a process that tried ended with {ended}", span, "asked for here", notes=last,
        help="nothing was written; write `emit torch` or `emit onnx`, and please report this with the versions of torch and of the driver",
    )  # fmt: skip


def read_record(path: Path) -> dict[str, Any] | None:
    """Our record of a package, read as data: nothing in the file runs. None where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"extra/{EXTRA}")), None)
            if name is None or archive.getinfo(name).file_size > 64 << 20:
                return None
            found = json.loads(archive.read(name))
    except (OSError, ValueError, zipfile.BadZipFile, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _failed(code: str, what: str, exc: Exception, span: Span | None, help: str) -> SurgeryError:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines
    return fail(code, what, span, "asked for here", notes=tuple(line[:200] for line in told[:3]) or (type(exc).__name__,), help=help)


@contextmanager
def quiet() -> Iterator[None]:
    """Inductor and the exporter log and warn through several channels; none of it belongs in our output."""
    import logging

    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryFile("w+"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
