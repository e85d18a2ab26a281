"""Which slices of which parameters belong together, read off one forward pass.

:class:`AxisGraph` runs a model once and follows what every dimension of every tensor is made of; its groups are the
units that can be removed, :func:`verify_groups` puts them through two oracles, :func:`remove_units` removes them.
"""

from singe_plugin.rollback import Snapshot, Trackers

from .graph import AxisGraph
from .groups import Group
from .oracles import verify_groups
from .parameters import UnitSlice
from .removal import remove_units

__all__ = ["AxisGraph", "Group", "Snapshot", "Trackers", "UnitSlice", "remove_units", "verify_groups"]
