"""Trains the artifact of `make demo` on something that every Python installation has: the docstrings of its library.

A docstring shall lie near the summary of the module that its function comes from; a quarter of the functions is held out. About a
minute on one core. The trained artifact is written beside the one of the demo.

Usage: python examples/train.py [BUILD_FOLDER] [STEPS]
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

import surgery

MODULES = ("ast", "asyncio", "calendar", "inspect", "math", "os", "random", "shutil", "socket", "statistics", "threading", "unittest")


def first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def examples() -> list[tuple[str, int]]:
    """First lines of docstrings, each with the index of its module."""
    return sorted(
        {
            (first_line(value), topic)
            for topic, name in enumerate(MODULES)
            for key, value in inspect.getmembers(importlib.import_module(name), callable)
            if not key.startswith("_") and len(first_line(value)) > 20
        }
    )


def embed(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence vectors [texts, width]."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(build / "minilm-lora")
    model = surgery.load(build / "minilm-lora")
    topics = [first_line(importlib.import_module(name)) for name in MODULES]
    found = examples()
    held, training = found[::4], [e for i, e in enumerate(found) if i % 4]

    def scores(batch: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity of each docstring to each summary [batch, modules], and the right module [batch]."""
        similar = embed(model, tokenizer, [line for line, _ in batch]) @ embed(model, tokenizer, topics).T
        return 20 * similar, torch.tensor([topic for _, topic in batch])

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        similar, right = scores(held)
        return float((similar.argmax(1) == right).float().mean())

    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} parameters train on {len(training)} docstrings; {len(held)} are held out")
    print(f"held out, before: {accuracy():.0%} find their module")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    for step in range(1, steps + 1):
        batch = [training[i] for i in torch.randint(len(training), (16,)).tolist()]
        loss = F.cross_entropy(*scores(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step}: loss {loss.item():.2f}")
    print(f"held out, after:  {accuracy():.0%}")
    print(surgery.save(model, build / "minilm-trained", force=True))


if __name__ == "__main__":
    main()
