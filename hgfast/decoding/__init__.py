"""From heatmaps to joint coordinates."""

from hgfast.decoding.dispatch import decode
from hgfast.decoding.options import Flip, GlobalTopK, TopK, Transform
from hgfast.decoding.reference import METHODS

__all__ = ["METHODS", "Flip", "GlobalTopK", "TopK", "Transform", "decode"]
