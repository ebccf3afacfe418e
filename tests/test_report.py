"""The page that `emit report` writes: what it shows of a surgery, and that it needs nothing but itself."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.driver_support import surgery

CONFIG = """{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
 "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 99, "num_local_experts": 4, "num_experts_per_tok": 2}"""
BERT = """{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
 "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64}"""
SPEC = """surg 1
model "config:bert"
prune heads(ratio = 50%) on layers[0, 2].attn
prune ffn(keep = 40) on layers[1].ffn
adapt lora(rank = 4) on layers[*].attn.{q, v}
emit onnx to "small.onnx"
emit report(timings = true) to "page.html"
"""
EXPERTS = """surg 1
model "config:mixtral"
prune experts(keep = 3) on layers[1].ffn
emit report to "experts.html"
"""


class Page(HTMLParser):
    """Tags that are open, texts, titles of cells, and everything that would fetch something."""

    VOID = frozenset({"meta", "rect", "circle", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.fetched: list[str] = []
        self.heads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["title"]:
            self.titles.append(data)
        if self.open[-1:] == ["h2"]:
            self.heads.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    home = tmp_path_factory.mktemp("report")
    for name, config in (("bert", BERT), ("mixtral", CONFIG)):
        (home / name).mkdir()
        (home / name / "config.json").write_text(config)
    for name, text in (("a.surg", SPEC), ("b.surg", EXPERTS)):
        (home / name).write_text(text)
        ran = surgery("compile", str(home / name), "--out", str(home))
        assert ran.code == 0, ran.err
    return (home / "page.html").read_text(), (home / "experts.html").read_text(), home


def test_it_needs_no_network_and_is_well_formed(pages: tuple[str, str, Path]) -> None:
    for text in pages[:2]:
        page = Page(text)
        assert page.open in ([], ["html"]) and page.fetched == []
        assert "<script" not in text and "url(" not in text and "@import" not in text and "http" not in text


def test_heads_and_units_that_went_are_marked(pages: tuple[str, str, Path]) -> None:
    page = Page(pages[0])
    heads = [t for t in page.titles if ": head " in t]
    assert len(heads) == 12 and sum(t.endswith("gone") for t in heads) == 4
    assert all(t.startswith(("layers[0]", "layers[2]")) for t in heads if t.endswith("gone"))
    assert "2 of 4 heads" in pages[0] and "40 of 64 units" in pages[0] and "64 of 64 units" in pages[0]
    shares = [
        int(m.group(1)) * (int(m.group(3)) - int(m.group(2)) + 1)
        for m in re.finditer(r"layers\[1\]\.ffn\.up: (\d+)% of units (\d+) to (\d+)", pages[0])
    ]
    assert sum(shares) == 40 * 100


def test_it_tells_of_fusions_outputs_and_times(pages: tuple[str, str, Path]) -> None:
    page = Page(pages[0])
    assert {
        "Totals",
        "Anatomy",
        "Heads",
        "Feed-forward width",
        "Ranks and widths",
        "Time",
        "Statements",
        "Certificates",
        "Fusions",
        "Outputs",
        "The spec",
    } <= set(page.heads)
    assert "torch, before" in pages[0] and "onnx, small.onnx" in pages[0]
    assert "Time" not in Page(pages[1]).heads and "Heads" not in Page(pages[1]).heads


def test_the_use_of_experts_is_counted(pages: tuple[str, str, Path]) -> None:
    counted: dict[str, list[float]] = {}
    for title in Page(pages[1]).titles:
        if found := re.fullmatch(r"(layers\[\d\]\.ffn): expert \d takes ([\d.]+)% of the choices", title):
            counted.setdefault(found[1], []).append(float(found[2]))
    assert {k: len(v) for k, v in counted.items()} == {"layers[0].ffn": 4, "layers[1].ffn": 3, "layers[2].ffn": 4}
    assert all(abs(sum(v) - 100) < 0.5 and max(v) > min(v) for v in counted.values())


def test_a_browser_shows_it(pages: tuple[str, str, Path]) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    shot = pages[2] / "page.png"
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    window = [f"--user-data-dir={pages[2] / 'profile'}", "--window-size=800,900", f"--screenshot={shot}"]
    command = [browser, "--headless", *quiet, *window, (pages[2] / "page.html").as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    seen = pixels(shot.read_bytes())
    red, blue = seen[..., 0].astype(int), seen[..., 2].astype(int)
    assert seen.shape[:2] == (900, 800) and int((blue > red + 60).sum()) > 8_000, "the pictures of the anatomy are not drawn"
    text = int((seen[..., :3].max(axis=-1) < 90).sum())
    assert text > 4_000, "there is next to no text"


def pixels(data: bytes) -> np.ndarray:
    """The picture of a PNG of 8 bits a channel that is not interlaced, shape (height, width, channels)."""
    assert data.startswith(b"\x89PNG")
    packed, at = b"", 8
    width = height = channels = 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body, at = data[at + 8 : at + 8 + size], at + 12 + size
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            channels = {2: 3, 6: 4}[colour]
            assert depth == 8 and body[12] == 0
        packed += body if kind == b"IDAT" else b""
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    above, out = np.zeros((width, channels), np.uint8), []
    for line in lines:
        row, kind = line[1:].reshape(width, channels).copy(), int(line[0])
        if kind == 1:
            row = np.cumsum(row, axis=0, dtype=np.uint8)
        elif kind == 2:
            row += above
        elif kind > 2:
            for x in range(width):
                left, up, corner = (
                    (row[x - 1] if x else 0 * row[0]).astype(int),
                    above[x].astype(int),
                    (above[x - 1] if x else 0 * row[0]).astype(int),
                )
                if kind == 3:
                    row[x] += ((left + up) // 2).astype(np.uint8)
                else:
                    guess = left + up - corner
                    gaps = np.abs(np.stack([left, up, corner]) - guess)
                    row[x] += np.choose(gaps.argmin(axis=0), [left, up, corner]).astype(np.uint8)
        above = row
        out.append(row)
    return np.stack(out)
