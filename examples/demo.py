"""What `make demo` shows at its end: where everything is, and that the adapted encoder still means what it meant.

Usage: python examples/demo.py [BUILD_FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import surgery
from surgery.model.checkpoint import open_checkpoint

PAIRS = (
    ("A surgeon prepares the patient.", "The doctor gets ready to operate."),
    ("The compiler checks every line.", "Each statement is verified before it runs."),
    ("The cat sleeps on the sofa.", "Interest rates rose again in March."),
)


def embed(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence vectors [texts, width]."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    artifact = build / "minilm-lora"
    base_path = open_checkpoint("minilm").path
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    before = AutoModel.from_pretrained(base_path).eval()
    after = surgery.load(artifact).eval()
    texts = [text for pair in PAIRS for text in pair]
    similar = []
    for model in (before, after):
        vectors = embed(model, tokenizer, texts)
        similar.append([float(vectors[2 * i] @ vectors[2 * i + 1]) for i in range(len(PAIRS))])
    print("cosine similarity      before     after")
    for (left, right), x, y in zip(PAIRS, *similar, strict=True):
        print(f"  {x:18.6f}  {y:8.6f}   {left} / {right}")
    print(f"\nartifact  {artifact}\nonnx      {build / 'minilm-lora.onnx'}\nreport    {build / 'minilm-lora.html'}")
    print(f"""
Train it like any module; only the LoRA tensors have requires_grad:

    import surgery, torch
    model = surgery.load("{artifact}").train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...                                          # or hand it to transformers.Trainer
    surgery.save(model, "{build}/minilm-trained")

then fold and export what was trained:

    surgery compile specs/fold_and_export.surg {build}/minilm-trained --force""")


if __name__ == "__main__":
    main()
