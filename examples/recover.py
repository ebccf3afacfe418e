"""Wins back what pruning lost: the LoRA of a pruned MiniLM learns to give the vectors of the whole one.

The texts are first lines of docstrings, which every Python installation has; a quarter of them is held out. Before and after
training it prints how near the pruned model's sentence vectors are to the original's, and how often both find the same nearest
neighbour among the held-out texts. About two minutes on two cores.

Usage: surgery compile specs/prune_minilm.surg && python examples/recover.py [BUILD_FOLDER] [STEPS]
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import surgery
from surgery.model.checkpoint import open_checkpoint

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent.futures",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml.etree",
)
SINGLE = (
    "argparse",
    "ast",
    "calendar",
    "datetime",
    "difflib",
    "inspect",
    "random",
    "shutil",
    "socket",
    "statistics",
    "threading",
    "zipfile",
)


def modules() -> list[Any]:
    """The modules whose docstrings are read, those of packages with their parts."""
    found = [importlib.import_module(name) for name in SINGLE]
    for name in PACKAGES:
        package = importlib.import_module(name)
        found.append(package)
        for part in pkgutil.iter_modules(getattr(package, "__path__", ())):
            if not part.name.startswith("_") and part.name != "idlelib":
                try:
                    found.append(importlib.import_module(f"{name}.{part.name}"))
                except ImportError:
                    continue  # parts for other systems
    return found


def lines() -> list[str]:
    """First lines of docstrings of public functions and classes and their methods, sorted."""
    out: set[str] = set()
    for module in modules():
        for _, value in inspect.getmembers(module, lambda v: inspect.isclass(v) or inspect.isfunction(v)):
            methods = [v for _, v in inspect.getmembers(value, inspect.isfunction)] if inspect.isclass(value) else []
            for thing in (value, *methods):
                line = (inspect.getdoc(thing) or "").partition("\n")[0].strip()
                if 25 < len(line) < 120:
                    out.add(line)
    return sorted(out)


def embed(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence vectors [texts, width]."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def neighbours(vectors: torch.Tensor) -> torch.Tensor:
    """For each text the index of the other text that lies nearest."""
    return (vectors @ vectors.T).fill_diagonal_(-2).argmax(1)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 150
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(build / "minilm-pruned")
    teacher = AutoModel.from_pretrained(open_checkpoint("minilm").path).eval()
    student = surgery.load(build / "minilm-pruned")
    texts = lines()
    held, training = texts[::4], [t for i, t in enumerate(texts) if i % 4]
    with torch.no_grad():
        wanted = torch.cat([embed(teacher, tokenizer, held[i : i + 64]) for i in range(0, len(held), 64)])

    @torch.no_grad()
    def measure() -> tuple[float, float]:
        student.eval()
        got = torch.cat([embed(student, tokenizer, held[i : i + 64]) for i in range(0, len(held), 64)])
        return float((got * wanted).sum(1).mean()), float((neighbours(got) == neighbours(wanted)).float().mean())

    parameters = [p for p in student.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} parameters train on {len(training)} lines; {len(held)} are held out")
    print("held out, before: cosine {:.3f}, same nearest neighbour {:.0%}".format(*measure()))
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    student.train()
    for step in range(1, steps + 1):
        batch = [training[i] for i in torch.randint(len(training), (32,)).tolist()]
        with torch.no_grad():
            target = embed(teacher, tokenizer, batch)
        vectors = embed(student, tokenizer, batch)
        loss = (1 - (vectors * target).sum(1)).mean() + (vectors @ vectors.T - target @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"  step {step}: loss {loss.item():.3f}")
    print("held out, after:  cosine {:.3f}, same nearest neighbour {:.0%}".format(*measure()))
    print(surgery.save(student, build / "minilm-recovered", force=True))


if __name__ == "__main__":
    main()
