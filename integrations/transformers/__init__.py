"""What the models of transformers need beside what one forward pass shows: configurations that say their widths."""

from .config import follow_config

__all__ = ["follow_config"]
