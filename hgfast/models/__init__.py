"""Reference networks and their checkpoints."""

from hgfast.models.checkpoint import load_checkpoint
from hgfast.models.hourglass import StackedHourglass, hourglass

__all__ = ["StackedHourglass", "hourglass", "load_checkpoint"]
