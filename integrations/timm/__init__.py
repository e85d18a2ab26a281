"""What timm's models need beside what one forward pass shows: the widths that they keep for later calls.

Importing this package registers its adapters with :mod:`singe_plugin.axes`.
"""

from . import widths

__all__ = ["widths"]
