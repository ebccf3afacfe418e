"""What `make demo` shows at its end: where everything is, and that the adapted encoder still means what it meant.

Usage: python examples/demo.py [BUILD_FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import surgery
from surgery.model.checkpoint import open_checkpoint

PAIRS = (
    ("A surgeon prepares the patient.", "The doctor gets ready to operate."),
    ("The compiler checks every line.", "Each statement is verified before it runs."),
    ("The cat sleeps on the sofa.", "Interest rates rose again in March."),
)


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean-pooled, normalised sentence vectors [texts, width] from states [texts, length, width] and mask [texts, length]."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


def similarities(vectors: torch.Tensor) -> list[float]:
    """Cosines of neighbours: the first with the second, the third with the fourth ..."""
    return (vectors[0::2] * vectors[1::2]).sum(-1).tolist()


def main() -> None:
    logging.disable_progress_bar()
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    artifact, onnx = build / "minilm-lora", build / "minilm-lora.onnx"
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    batch = tokenizer([text for pair in PAIRS for text in pair], padding=True, return_tensors="pt")
    columns = []
    for model in (AutoModel.from_pretrained(open_checkpoint("minilm").path).eval(), surgery.load(artifact).eval()):
        with torch.no_grad():
            columns.append(similarities(pooled(model(**batch).last_hidden_state, batch["attention_mask"])))
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    states = session.run(None, {i.name: batch[i.name].numpy().astype(np.int64) for i in session.get_inputs()})[0]
    columns.append(similarities(pooled(torch.from_numpy(states), batch["attention_mask"])))

    print("\ncosine similarity of sentence pairs\n     before     after      onnx")
    for (left, right), *values in zip(PAIRS, *columns, strict=True):
        print("  " + "".join(f"{v:9.6f} " for v in values) + f"  {left} / {right}")
    print(f"\nartifact  {artifact}\nonnx      {onnx}\nreport    {build / 'minilm-lora.html'}")
    print(f"""
Train it like any module; only the LoRA tensors have requires_grad:

    import surgery, torch
    model = surgery.load("{artifact}").train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...                                          # or hand it to transformers.Trainer
    surgery.save(model, "{build}/minilm-trained")

or see it happen, then fold and export what was trained:

    .venv/bin/python examples/train.py {build}
    .venv/bin/surgery compile specs/fold_and_export.surg {build}/minilm-trained --force""")


if __name__ == "__main__":
    main()
