"""Which slices of which parameters belong together, read off one forward pass.

:class:`AxisGraph` runs a model once and follows what every dimension of every tensor is made of; its groups are the
units that can be removed, :func:`verify_groups` puts them through two oracles, :func:`remove_units` removes them.
:func:`find_blocks` finds the residual blocks that can go as a whole, :func:`remove_block` removes one.
"""

from singe_plugin.rollback import Snapshot, Trackers

from .blocks import Block
from .depth import find_blocks, remove_block
from .graph import AxisGraph
from .groups import Group
from .oracles import verify_groups
from .parameters import UnitSlice
from .removal import remove_units

__all__ = [
    "AxisGraph", "Block", "Group", "Snapshot", "Trackers", "UnitSlice", "find_blocks", "remove_block", "remove_units",
    "verify_groups",
]  # fmt: skip
