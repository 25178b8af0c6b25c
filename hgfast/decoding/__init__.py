"""From heatmaps to joint coordinates."""

from hgfast.decoding.dispatch import decode
from hgfast.decoding.reference import METHODS

__all__ = ["METHODS", "decode"]
