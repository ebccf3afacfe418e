"""Capture: a configured or live model as a tree of graphs without weights.

The root and each repeated layer are GraphModules at the model's own paths; parametric leaves are ``nn`` modules, other
tensors are read by ``get_attr`` below the graph that uses them, and between stand aten operations. Every node has
``meta["spec"]``. Nothing here holds a weight or a tensor of a live model.
"""

from surgery.model.capture.materialise import clone_tree, materialise
from surgery.model.capture.pipeline import Captured, capture_config, capture_module

__all__ = ["Captured", "capture_config", "capture_module", "clone_tree", "materialise"]
