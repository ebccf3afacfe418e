"""The command line: exit codes, streams, formats, files, interruptions. Nothing here needs torch."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli import main as cli
from surgery.cli.main import VERBS, command, main

GOOD = "surg 1\n\nadapt lora(rank = 8) on layers[*].attn.q\n"
BAD = "surg 1\n\nadapt lora(rnk = 8) on layers[*].attn.q\n"
WARNS = 'surg 1\n\nemit torch to "x"\nadapt lora(rank = 8) on layers[*].attn.q\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "good.surg").write_text(GOOD)
    (tmp_path / "bad.surg").write_text(BAD)
    (tmp_path / "warns.surg").write_text(WARNS)
    return tmp_path


def surgery(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "surgery.cli.main", *args], capture_output=True, text=True, **more)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("format", ["text", "json", "sarif", "github"])
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["check", "good.surg"], 0),
        (["check", "bad.surg"], 1),
        (["check", "good.surg", "bad.surg"], 1),
        (["check", "warns.surg"], 0),
        (["check", "warns.surg", "--deny", "warnings"], 1),
        (["check", "missing.surg"], 2),
        (["check", "bad.surg", "missing.surg"], 2),
        (["check", "good.surg", "--set", "r=1"], 1),
        (["check", "good.surg", "--set", "r"], 2),
        (["check", "."], 2),
        (["check"], 2),
        (["check", "good.surg", "--nonsense"], 2),
        (["fmt", "--check", "good.surg"], 0),
        (["explain", "S0212"], 0),
        (["explain", "nothing-like-this"], 2),
        (["methods", "adapt"], 0),
        (["methods", "adpt"], 2),
        (["new", "thing"], 2),
        (["select", "layers"], 2),
    ],
)
def test_exit_codes_are_the_same_in_every_format(args: list[str], code: int, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*args, "--format", format]) == code
    out, err = capsys.readouterr()
    if format in ("json", "sarif"):
        document = json.loads(out)
        assert err == ""
        if code:
            found = document["diagnostics"] if format == "json" else document["runs"][0]["results"]
            assert found
    elif code == 1:
        assert ("error[S0" if format == "text" else "::error ") in err and out == ""
    elif code == 2:
        assert "S0" in err and "Traceback" not in err


def test_streams(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "good.surg"])
    assert capsys.readouterr() == ("", "no problems found\n")
    main(["check", "good.surg", "--quiet"])
    assert capsys.readouterr() == ("", "")
    main(["check", "bad.surg"])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[S0212]: `lora` has no parameter `rnk`\n --> bad.surg:3:12\n") and err.endswith("\n1 error\n")
    main(["explain", "lora"])
    out, err = capsys.readouterr()
    assert out.startswith("# adapt lora\n") and err == ""


def test_check_in_json_lists_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "good.surg", "bad.surg", "--format", "json"])
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == [{"file": "good.surg", "ok": True}, {"file": "bad.surg", "ok": False}]
    assert document["diagnostics"][0]["labels"][0]["file"] == "bad.surg"


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BAD.encode())))
    assert main(["check", "-"]) == 1
    assert "--> <stdin>:3:12" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"surg 1\nadapt   lora on layers\n")))
    assert main(["fmt", "-"]) == 0
    assert capsys.readouterr().out == "surg 1\nadapt lora on layers\n"


def test_fmt_in_place_check_and_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ugly = here / "ugly.surg"
    ugly.write_text("surg 1\nadapt   lora( rank=8,dropout=0.3 )  on layers # why\n")
    os.chmod(ugly, 0o640)
    before = ugly.read_bytes()
    assert main(["fmt", "--check", "ugly.surg"]) == 1 and ugly.read_bytes() == before
    capsys.readouterr()
    assert main(["fmt", "--diff", "ugly.surg"]) == 1 and ugly.read_bytes() == before
    out, _ = capsys.readouterr()
    assert out.startswith("--- ugly.surg\n+++ ugly.surg (formatted)\n") and "+adapt lora(rank = 8, dropout = 30%) on layers  # why" in out
    assert main(["fmt", "ugly.surg"]) == 0
    assert ugly.read_text() == "surg 1\nadapt lora(rank = 8, dropout = 30%) on layers  # why\n"
    assert ugly.stat().st_mode & 0o777 == 0o640
    assert main(["fmt", "--check", "."]) == 0
    assert sorted(p.name for p in here.iterdir()) == ["bad.surg", "good.surg", "ugly.surg", "warns.surg"], "no debris"


def test_fmt_leaves_a_file_with_syntax_errors(here: Path) -> None:
    broken = here / "broken.surg"
    broken.write_text("surg 1\nadapt lora( on layers\n")
    assert main(["fmt", "broken.surg"]) == 1 and broken.read_text() == "surg 1\nadapt lora( on layers\n"


def test_fmt_follows_a_link(here: Path) -> None:
    (here / "real.surg").write_text("surg 1\nadapt  lora on layers\n")
    (here / "link.surg").symlink_to("real.surg")
    assert main(["fmt", "link.surg"]) == 0
    assert (here / "link.surg").is_symlink() and (here / "real.surg").read_text() == "surg 1\nadapt lora on layers\n"


def test_fix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "f.surg"
    path.write_text('surg 1\nadapt lorra(rank = 8) on layers\nemit torch(dtype = "bf16") to "x"\n')
    assert main(["fix", "f.surg"]) == 1, "the guess is left"
    assert "dtype = bf16)" in path.read_text() and "lorra" in path.read_text()
    assert main(["fix", "--diff", "--unsafe", "f.surg"]) == 1 and "lorra" in path.read_text()
    assert "+adapt lora(rank = 8) on layers" in capsys.readouterr().out
    assert main(["fix", "--unsafe", "f.surg"]) == 0 and "adapt lora(" in path.read_text()


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="root may write anywhere")
def test_unwritable_folder(here: Path) -> None:
    os.chmod(here, 0o500)
    try:
        assert main(["new", "spec", "x.surg"]) == 2
    finally:
        os.chmod(here, 0o700)


def test_no_space_left(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    path = here / "ugly.surg"
    path.write_text("surg 1\nadapt  lora on layers\n")
    monkeypatch.setattr(os, "fsync", full)
    assert main(["fmt", "ugly.surg"]) == 2
    assert "error[S0910]: cannot write ugly.surg: no space left on device" in capsys.readouterr().err
    assert path.read_text() == "surg 1\nadapt  lora on layers\n" and not list(here.glob(".*"))


def test_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "bad.surg", "--color", "always"])
    assert "\x1b[1;31m" in capsys.readouterr().err
    main(["check", "bad.surg", "--color=never"])
    assert "\x1b" not in capsys.readouterr().err
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["check", "bad.surg"])
    assert "\x1b[1;31m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    main(["check", "bad.surg"])
    assert "\x1b" not in capsys.readouterr().err


def test_internal_fault_is_a_diagnostic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def boom(*args: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("surgery.front.check_source", boom)
    assert main(["check", "good.surg"]) == 2
    err = capsys.readouterr().err
    assert "error[S0901]: internal error: ZeroDivisionError: a fault of ours (test_cli.py:" in err and "Traceback" not in err
    assert main(["check", "good.surg", "--format", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["diagnostics"][0]["code"] == "S0901"
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["check", "good.surg"])


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.front.check_source", stop)
    assert main(["check", "good.surg"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(("name", "code_"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_real_interrupt_leaves_nothing(name: str, code_: int, here: Path) -> None:
    code = f"import os, signal, surgery.cli.report as r\nold = os.fsync\ndef stop(fd):\n    os.kill(os.getpid(), signal.{name})\n    old(fd)\nos.fsync = stop\n"
    code += "import sys\nfrom surgery.cli.main import main\nsys.exit(main(['fmt', 'ugly.surg']))\n"
    (here / "ugly.surg").write_text("surg 1\nadapt  lora on layers\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == code_ and "Traceback" not in done.stderr
    assert (here / "ugly.surg").read_text() == "surg 1\nadapt  lora on layers\n" and not list(here.glob(".*"))
    assert signal.getsignal(signal.SIGINT) is not None


def test_a_reader_that_goes_away() -> None:
    line = f"{sys.executable} -m surgery.cli.main methods --format json | true"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.stderr == ""


@pytest.mark.parametrize("format", ["text", "json", "sarif"])
def test_a_full_disk_behind_the_output_is_said(format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["check", "bad.surg", "--format", format]) == 2
    err = capsys.readouterr().err
    assert "error[S0910]: cannot write the output: no space left on device" in err and "S0901" not in err


def test_output_that_cannot_hold_every_character(here: Path) -> None:
    (here / "名.surg").write_text("surg 1\nadapt lora(ränk = 8) on layers\n")
    done = surgery("check", "名.surg", env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"})
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error[S0" in done.stderr


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in overview
        assert main([verb, "--help"]) == 0
        page = capsys.readouterr().out
        assert page.startswith(f"usage: surgery {verb}")
        for option in command(verb).all_options:
            assert f"--{option.name}" in page
    assert main([]) == 2 and capsys.readouterr().out == overview
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("surgery 0.") and any(row.startswith("torch ") for row in lines)
    assert main(["chek"]) == 2 and "did you mean `check`?" in capsys.readouterr().err


def test_new_spec_is_right_and_formatted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "spec", "mine.surg", "--model", 'a "b"']) == 0
    assert main(["check", "mine.surg", "--deny", "warnings"]) == 0
    assert main(["fmt", "--check", "mine.surg"]) == 0
    assert main(["new", "spec", "mine"]) == 2
    assert "error[S0913]: mine.surg exists" in capsys.readouterr().err
    assert main(["new", "spec", "mine", "--force"]) == 0


@pytest.mark.parametrize("name", ["adapt", "adapt/Bad", "adapt/../x", "adopt/x", "adapt/lora", "adapt/1x", "replace/x", "fold/x"])
def test_new_method_refuses(name: str, here: Path) -> None:
    (here / "passes").mkdir()
    assert main(["new", "method", name, "--folder", "."]) == 2
    assert list((here / "passes").iterdir()) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completion_completes(here: Path) -> None:
    assert surgery("completion", "bash").returncode == 0
    (here / "comp.sh").write_text(surgery("completion", "bash").stdout)

    def complete(*words: str) -> list[str]:
        array = " ".join(f"'{w}'" for w in ("surgery", *words))
        script = f"source ./comp.sh; COMP_WORDS=({array}); COMP_CWORD={len(words)}; _surgery; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert complete("ch") == ["check"]
    assert complete("check", "goo") == ["good.surg"]
    assert complete("check", "--form") == ["--format"]
    assert complete("check", "--format", "s") == ["sarif"]
    assert "rslora" in complete("explain", "rsl")
    for shell in ("zsh", "fish"):
        if shutil.which(shell):
            text = surgery("completion", shell).stdout
            assert subprocess.run([shell, "-n", "-c", text], capture_output=True).returncode == 0


def test_docs_of_the_command_line_are_fresh() -> None:
    from surgery.dev import ROOT, cli_page

    assert (ROOT / "docs/cli.md").read_text("utf-8") == cli_page(), "run `python -m surgery.dev generate`"


def test_python_check() -> None:
    import surgery as package

    assert [d.code for d in package.check(BAD, "x.surg")] == ["S0212"]
    assert package.check("surg 1\nparam r = 8\nadapt lora(rank = r) on layers\n", set={"r": "16"}) == []
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018
    assert set(package.__all__) <= set(dir(package))


def test_what_this_version_lacks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The language names outputs and verbs that have nothing behind them yet: the lists and the pages say which."""
    from surgery.backends.registry import names
    from surgery.core.catalogue import BACKENDS, METHOD_VERBS, load

    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name, entry in BACKENDS.items():
        assert (f"{entry.summary} (not yet in this version)" in out) == (name not in names())
        main(["explain", name])
        assert ("cannot emit it yet" in capsys.readouterr().out) == (name not in names())
    lacking = [verb for verb in METHOD_VERBS if not load().names(verb)]
    assert (f"no method yet in this version: {', '.join(lacking)}" in out) == bool(lacking)
    page = (Path(__file__).resolve().parent.parent / "docs/language.md").read_text("utf-8")
    for verb in METHOD_VERBS:
        assert main(["explain", verb]) == 0
        shown = capsys.readouterr().out
        assert ("no method for this verb yet" in shown) == (verb in lacking)
        for name in load().names(verb):
            assert f"`{verb} {name}`" in shown and f"`{name}`" in page
