"""Random specs: the front end gives findings or success and can render them, never anything else.

``python tests/test_checker_fuzz.py COUNT [SEED]`` runs more of them.
"""

from __future__ import annotations

import random
import sys
import time

from surgery.cli.views import github, sarif, text
from surgery.core.catalogue import BACKENDS, CHECKS, QUANTITIES, SOURCES, load
from surgery.core.source import Source
from surgery.front import check_source

WORDS = (
    "surg import param let model data adapter checkpoint adapt insert prune share convert freeze unfreeze fold merge train expect measure emit stage "
    "on after before beside using keep own except as of for within select to base by layers attn ffn q v up head embed r x late "
    "ramp true false none relu rank alpha dropout width at init"
).split()
MARKS = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "=",
    "..",
    ".",
    "*",
    "**",
    "@x",
    "?",
    "<=",
    ">=",
    "==",
    "\n",
    "\n",
    "\n",
    "#c",
    "##d\n",
    '"a.surg"',
    '"',
    "\t",
    "\r\n",
]
NUMBERS = [
    "0",
    "1",
    "8",
    "-1",
    "5..2",
    "0..3",
    "6..",
    "30%",
    "0.3",
    "1e-6",
    "2GiB",
    "10k",
    "1.1B",
    "1e999",
    "99999999999999999999",
    "3x",
    "1..9 by 0",
]
NAMES = [n for _, n in load().methods] + list(BACKENDS) + list(CHECKS) + list(QUANTITIES) + list(SOURCES)

GOOD = """surg 1
import "nothing.surg" as calib
model "minilm" as base
param r = 8
param share = 5%
let late = layers[6..]
let table = {0..3: 4, 4..11: 8}
data text = lines("calib.txt", samples = 128, length = 512)
adapter news = load("adapters/news")
adapt lora(rank = r, alpha = 16, dropout = share) on layers[*].attn.{q, v}, late.ffn as x
adapt dora(rank = table) on late.attn.{q, k} using text keep layers[0] except layers[1] as y
insert bottleneck(width = ramp(4, 16), activation = gelu) after layers[*].{attn, ffn}
freeze all on @x, "encoder.*.dense"?
merge linear(weight = [1, 2]) of news * 0.5, base * 50% on layers as z
train power(a = 4, batch = 256) on @y
stage tune { fold all on layers[-1].** }
expect trainable <= 0.5% of base on layers[0..11 by 2].attn for x
expect same_output(at = init) within 1e-6
expect runs(batch = 2, length = 16)
measure bench(x = 1) on layers using text
emit onnx(opset = 20, precision = fp16, live = true) to "build/a"
emit torch to "build/b"
"""


def spec(rng: random.Random) -> str:
    """A token soup, or a good spec with a few things changed."""
    if rng.random() < 0.35:
        pools = (WORDS, MARKS, NUMBERS, NAMES)
        body = " ".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(40)))
        return ("surg 1\n" if rng.random() < 0.8 else "") + body
    lines = GOOD.split("\n")
    if rng.random() < 0.7:
        lines = ["surg 1", *rng.sample(lines[1:], rng.randrange(1, 8))]
    body = "\n".join(lines)
    for _ in range(rng.randrange(5)):
        at = rng.randrange(len(body) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            body = body[:at] + body[at + rng.randrange(1, 6) :]
        elif kind == 1:
            body = body[:at] + rng.choice(rng.choice((WORDS, MARKS, NUMBERS, NAMES))) + body[at:]
        elif kind == 2:
            words = body.split(" ")
            words[rng.randrange(len(words))] = rng.choice(rng.choice((WORDS, MARKS, NUMBERS, NAMES)))
            body = " ".join(words)
        elif kind == 3:
            other = rng.randrange(len(body) + 1)
            body = body[:at] + body[min(at, other) : max(at, other)][:60] + body[at:]
        else:
            body = body[:at] + chr(rng.choice((0, 7, 0x1B, 0xE9, 0x2028, 0xD800, 0xFEFF, 0x1F600))) + body[at:]
    return body


def one(body: str, sets: dict[str, str]) -> int:
    """Checks and renders one text; gives the number of findings."""
    result, found = check_source(Source("fuzz.surg", body), sets)
    for item in result.statements:
        if item.call is not None:
            item.call.values()
    shown = text.render(found)
    assert not set(shown) & set("\x00\x07\x1b\u2028\ud800\ufeff"), "control characters reach the terminal"
    if found:
        sarif.render(found)
        github.render(found)
        for d in found:
            assert d.code.startswith("S0") and d.message and d.message == d.message.rstrip("."), d
    return len(found)


def run(count: int, seed: int) -> tuple[int, int]:
    """(texts with findings, texts without) of ``count`` random specs."""
    rng = random.Random(seed)
    wrong = 0
    for _ in range(count):
        body = spec(rng)
        sets = (
            {}
            if rng.random() < 0.8
            else {rng.choice(("r", "share", "zz", "calib.r")): rng.choice((*NUMBERS, *WORDS[:5], *MARKS[:12], "[1, 2]", '"x"'))}
        )
        try:
            wrong += bool(one(body, sets))
        except Exception:
            print(repr(body), sets, file=sys.stderr)
            raise
    return wrong, count - wrong


def test_random_specs() -> None:
    wrong, fine = run(3000, seed=7)
    assert wrong > 1000 and fine > 50, "the generator makes both"


def test_garbage_ends_soon() -> None:
    rng = random.Random(3)
    start = time.process_time()
    for alphabet in ("(", "{", "[", '"', "a", "\n", "surg 1\n", "adapt lora(", "let x = {", "@", "layers.", "".join(MARKS)):
        body = "surg 1\n" + (alphabet * (200_000 // len(alphabet)))
        found = check_source(Source("garbage.surg", body))[1]
        text.render(found[:100])
    body = "".join(chr(rng.randrange(1, 0x3000)) for _ in range(300_000))
    text.render(check_source(Source("garbage.surg", body))[1][:100])
    assert time.process_time() - start < 120


if __name__ == "__main__":
    began = time.perf_counter()
    print(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), f"{time.perf_counter() - began:.0f} s")
