"""The anatomy of a model: its parts under the roles that selectors name, found from the graph's dataflow."""

from surgery.model.anatomy.find import find_anatomy

__all__ = ["find_anatomy"]
