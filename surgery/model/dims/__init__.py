"""Dimension classes: which axes of a graph's tensors are the same, and what must change when units of one go.

``analyse`` walks a flat functional graph once. :class:`Dims` answers the questions.
"""

from surgery.model.dims.algebra import Axis
from surgery.model.dims.analyse import analyse
from surgery.model.dims.constants import Constant, Cut
from surgery.model.dims.groups import Change, Group, Leaf, Member
from surgery.model.dims.masks import Keep, Ranges
from surgery.model.dims.result import Dims

__all__ = ["Axis", "Change", "Constant", "Cut", "Dims", "Group", "Keep", "Leaf", "Member", "Ranges", "analyse"]
