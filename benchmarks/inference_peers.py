"""Runs in another Python: converts a checkpoint with a peer's tool. Called with one JSON argument; prints nothing that matters."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path


def readable(folder: Path, copy: Path) -> Path:
    """The checkpoint with the spellings that older versions of transformers read."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    path.write_text(json.dumps(config))
    return copy


def o2(folder: Path, target: Path, task: str) -> None:
    """optimum's export and its optimization level O2."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import AutoOptimizationConfig, ORTModelForCausalLM, ORTModelForFeatureExtraction, ORTOptimizer

    with tempfile.TemporaryDirectory() as place:
        source = readable(folder, Path(place) / "source")
        main_export(str(source), output=Path(place) / "plain", task=task, opset=17, do_validation=False, no_post_process=False)
        cls = ORTModelForCausalLM if "generation" in task else ORTModelForFeatureExtraction
        if (source / "preprocessor_config.json").exists() or json.loads((source / "config.json").read_text())["model_type"] == "vit":
            optimizer = ORTOptimizer.from_pretrained(str(Path(place) / "plain"), file_names=["model.onnx"])
        else:
            optimizer = ORTOptimizer.from_pretrained(cls.from_pretrained(str(Path(place) / "plain"), use_io_binding=False))
        optimizer.optimize(save_dir=str(Path(place) / "o2"), optimization_config=AutoOptimizationConfig.O2(), file_suffix="")
        made = sorted((Path(place) / "o2").glob("*.onnx"))[0]
        data = sorted((Path(place) / "o2").glob("*.data"))
        if data:
            import onnx

            onnx.save_model(onnx.load(str(made)), str(target))
        else:
            shutil.copy(made, target)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    {"o2": o2}[asked["what"]](Path(asked["folder"]), Path(asked["target"]), asked["task"])
