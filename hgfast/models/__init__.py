"""Reference networks and their checkpoints."""

from hgfast.models.hourglass import StackedHourglass, hourglass

__all__ = ["StackedHourglass", "hourglass"]
