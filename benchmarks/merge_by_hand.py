"""Two other ways to fold one LoRA into a sharded checkpoint: peft's, and a loop written for this one case.

python -m benchmarks.merge_by_hand peft|streamed BASE ADAPTER TARGET
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def peft(base: Path, adapter: Path, target: Path, shard: int) -> None:
    """The whole model in memory, its adapter beside it, merged and saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target, max_shard_size=shard)


def streamed(base: Path, adapter: Path, target: Path) -> None:
    """One shard after the other; the product is formed in float32 and rounded once."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    target.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
            continue
        made = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():
                value = stored.get_tensor(name)
                at = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{at}.lora_A.weight" in factors:
                    wide = value.float().addmm_(factors[f"{at}.lora_B.weight"], factors[f"{at}.lora_A.weight"], alpha=scale)
                    value = wide.to(value.dtype)
                made[name] = value
        save_file(made, target / file.name, {"format": "pt"})


def main() -> None:
    way, base, adapter, target, *shard = sys.argv[1:]
    if way == "peft":
        peft(Path(base), Path(adapter), Path(target), int(shard[0]))
    else:
        streamed(Path(base), Path(adapter), Path(target))


if __name__ == "__main__":
    main()
