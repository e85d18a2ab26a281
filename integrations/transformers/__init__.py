"""What the models of transformers need beside what one forward pass shows: configurations that say their widths.

``SInGEPruningCallback``, for its ``Trainer``, is imported when it is asked for: with it comes transformers itself.
"""

from typing import TYPE_CHECKING, Any

from .config import follow_config

if TYPE_CHECKING:
    from .callback import SInGEPruningCallback as SInGEPruningCallback

__all__ = ["follow_config"]


def __getattr__(name: str) -> Any:
    if name == "SInGEPruningCallback":
        from .callback import SInGEPruningCallback

        return SInGEPruningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
