"""The sixteen joints of MPII Human Pose, in its order, and what follows from them.

Andriluka et al., "2D Human Pose Estimation", CVPR 2014. "Right" and "left" are the
person's own: of somebody who faces the camera, the right hand is on the picture's left.
"""

from __future__ import annotations

from typing import Final

JOINTS: Final = (
    "right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle",
    "pelvis", "thorax", "neck", "head top",
    "right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist",
)  # fmt: skip

# Joints that change places in a mirrored picture.
MIRROR_PAIRS: Final = ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))

# MIRROR[j] is the joint that joint j becomes in a mirrored picture.
MIRROR: Final = tuple(
    next((b if a == joint else a for a, b in MIRROR_PAIRS if joint in (a, b)), joint)
    for joint in range(len(JOINTS))
)

# The bones that a drawing of the skeleton shows: (from, to, side).
BONES: Final = (
    (6, 2, "right"), (2, 1, "right"), (1, 0, "right"),
    (6, 3, "left"), (3, 4, "left"), (4, 5, "left"),
    (6, 7, "middle"), (7, 8, "middle"), (8, 9, "middle"),
    (7, 12, "right"), (12, 11, "right"), (11, 10, "right"),
    (7, 13, "left"), (13, 14, "left"), (14, 15, "left"),
)  # fmt: skip
