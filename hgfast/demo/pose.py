"""Random people in random poses: a body in three dimensions, and how it is seen.

A pose is a handful of joint angles, drawn around an attitude (walking, cheering, sitting,
...) and kept within what human joints allow. Forward kinematics turns it into points.

The person's own axes: x to the person's left, y up, z forward; the unit is body height.
The viewer's: x right, y down, z towards the viewer. Facing the camera, left is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hgfast.demo.canvas import Array

Angles = tuple[float, float, float, float]


@dataclass(frozen=True)
class Attitude:
    """What a body is doing: mean joint angles in degrees, and how far they may stray.

    An arm: raised sideways, raised forwards, turned inwards, elbow bent. A leg: moved
    sideways, forwards, turned out, knee bent. Two rows are one side and the other, one row
    is both. ``lean`` bends the torso forwards.
    """

    arms: tuple[Angles, ...]
    legs: tuple[Angles, ...]
    odds: float = 1.0
    spread: float = 1.0
    lean: float = 0.0


_ATTITUDES = (
    Attitude(((12, 0, 20, 15),), ((6, 0, 8, 4),), odds=1.5, spread=0.7),  # standing
    Attitude(((10, 35, 20, 35), (10, -35, 20, 25)), ((4, -20, 5, 20), (4, 28, 5, 10)), 1.5),  # walk
    Attitude(((14, 45, 25, 85), (14, -50, 25, 85)), ((4, -28, 3, 75), (4, 55, 3, 55)), 1.2),  # run
    Attitude(((125, 0, 0, 15),), ((28, 0, 12, 5),)),  # star
    Attitude(((150, 10, 0, 25),), ((10, 0, 8, 8),)),  # cheering
    Attitude(((95, 0, -85, 85), (14, 0, 20, 15)), ((7, 0, 8, 5),), 1.2, spread=0.8),  # waving
    Attitude(((42, -15, 85, 95),), ((10, 0, 8, 4),), spread=0.6),  # hands on hips
    Attitude(((18, 30, 30, 60),), ((14, 80, 10, 88),), 0.9, lean=8),  # sitting
    Attitude(((20, 70, 10, 25),), ((20, 75, 15, 110),), 0.7, lean=20),  # squat
    Attitude(((85, 0, 0, 10),), ((8, 0, 5, 5), (55, 10, 40, 95)), 0.8),  # tree
    Attitude(((60, 20, 30, 40), (110, 10, 0, 30)), ((8, -5, 5, 8), (20, 65, 5, 20)), 0.8),  # kick
    Attitude(((60, 30, 20, 60),), ((15, 15, 10, 30),), 2.0, spread=1.8),  # anything
)
_ARM_SPREAD, _LEG_SPREAD = (20.0, 22.0, 25.0, 22.0), (8.0, 14.0, 8.0, 16.0)
_ARM_LIMITS = ((-8.0, -55.0, -100.0, 0.0), (170.0, 150.0, 100.0, 145.0))
_LEG_LIMITS = ((-12.0, -35.0, -20.0, 0.0), (60.0, 110.0, 45.0, 135.0))


def rotation(axis: str, degrees: float) -> Array:
    """Right-handed rotation about one axis, (3, 3)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rows = {
        "x": ((1, 0, 0), (0, c, -s), (0, s, c)),
        "y": ((c, 0, s), (0, 1, 0), (-s, 0, c)),
        "z": ((c, -s, 0), (s, c, 0), (0, 0, 1)),
    }
    return np.array(rows[axis], np.float32)


@dataclass(frozen=True)
class Build:
    """Proportions in body heights, before the individual's scatter."""

    head: float = 0.088  # radius
    neck: float = 0.045
    spine: float = 0.275
    shoulder: float = 0.098  # half width
    hip: float = 0.055  # half width
    upper_arm: float = 0.160
    forearm: float = 0.145
    thigh: float = 0.235
    shin: float = 0.225
    foot: float = 0.085
    girth: float = 1.0  # thickness of everything

    @staticmethod
    def sample(rng: np.random.Generator) -> Build:
        """An individual: an adult, or now and then a child with a large head and short limbs."""
        standard = Build()
        child = rng.random() < 0.2
        limb, head = (0.82, 1.28) if child else (1.0, 1.0)
        values = {}
        for name, value in vars(standard).items():
            scale = head if name == "head" else limb if value > 0.12 and name != "girth" else 1.0
            values[name] = value * scale * float(np.exp(rng.normal(0, 0.06)))
        values["girth"] *= float(np.exp(rng.normal(0.05, 0.12)))
        return Build(**values)


@dataclass
class Body:
    """A posed person as points (3,) in the viewer's axes, in body heights.

    ``joints`` (16, 3) is in MPII order; ``hands`` and ``toes`` are [right, left];
    ``head`` is the centre of the head; ``torso_frame`` and ``head_frame`` hold the person's
    axes (columns: left, up, forward) in the viewer's.
    """

    build: Build
    joints: Array
    hands: list[Array]
    toes: list[Array]
    head: Array
    torso_frame: Array
    head_frame: Array
    yaw: float  # degrees; 0 faces the camera
    roll: float  # degrees in the picture's plane


def _angles(
    rng: np.random.Generator,
    rows: tuple[Angles, ...],
    spread: Angles,
    limits: tuple[Angles, Angles],
    scale: float,
) -> Array:
    """Joint angles [right, left] (2, 4) around an attitude's rows, which may swap sides."""
    mean = np.array(rows if len(rows) == 2 else rows * 2)
    if rng.random() < 0.5:
        mean = mean[::-1]
    drawn = mean + rng.normal(size=(2, 4)) * np.array(spread) * scale
    return np.asarray(np.clip(drawn, *limits), np.float32)


def sample(rng: np.random.Generator) -> Body:
    """Draw a person and a pose.

    Three in four face the camera within 65 degrees, one in five shows the back, few the side.
    """
    build = Build.sample(rng)
    odds = np.array([attitude.odds for attitude in _ATTITUDES])
    attitude = _ATTITUDES[rng.choice(len(odds), p=odds / odds.sum())]
    arms = _angles(rng, attitude.arms, _ARM_SPREAD, _ARM_LIMITS, attitude.spread)
    legs = _angles(rng, attitude.legs, _LEG_SPREAD, _LEG_LIMITS, attitude.spread)
    lean = attitude.lean + rng.normal(4, 8)

    turn = rng.random()
    if turn < 0.77:
        yaw = float(np.clip(rng.normal(0, 28), -65, 65))
    elif turn < 0.95:
        yaw = 180 + float(np.clip(rng.normal(0, 26), -60, 60))
    else:
        yaw = float(rng.choice([-90, 90]) + rng.normal(0, 15))
    roll = rng.normal(0, 8) if rng.random() < 0.95 else rng.uniform(-50, 50)

    root = rotation("z", roll) @ rotation("x", rng.normal(4, 6)) @ rotation("y", yaw)
    torso = (
        root
        @ rotation("x", np.clip(lean, -15, 40))
        @ rotation("z", np.clip(rng.normal(0, 7), -18, 18))
        @ rotation("y", np.clip(rng.normal(0, 10), -25, 25))
    )
    head = (
        torso
        @ rotation("y", np.clip(rng.normal(0, 18), -45, 45))
        @ rotation("x", np.clip(rng.normal(0, 10) - 0.5 * lean, -30, 25))
        @ rotation("z", np.clip(rng.normal(0, 8), -20, 20))
    )
    return _assemble(build, arms, legs, root, torso, head, yaw, float(roll))


def _assemble(
    build: Build,
    arms: Array,
    legs: Array,
    root: Array,
    torso: Array,
    head: Array,
    yaw: float,
    roll: float,
) -> Body:
    """Forward kinematics from the pelvis outwards."""
    down = np.array([0, -1, 0], np.float32)
    joints = np.zeros((16, 3), np.float32)
    joints[7] = torso @ np.array([0, build.spine, 0], np.float32)
    joints[8] = joints[7] + torso @ np.array([0, build.neck, 0.008], np.float32)
    centre = joints[8] + head @ np.array([0, 0.93 * build.head, 0.012], np.float32)
    joints[9] = centre + head @ np.array([0, 0.97 * build.head, 0], np.float32)

    hands, toes = [], []
    chains = ((-1.0, (12, 11, 10), (2, 1, 0)), (1.0, (13, 14, 15), (3, 4, 5)))
    for row, (side, arm, leg) in enumerate(chains):
        raised, forward, turned, bend = (float(a) for a in arms[row])
        # The shoulder girdle rises with the arm.
        lift = 0.022 * max(0.0, raised - 60) / 90
        offset = np.array([side * build.shoulder, lift - 0.012, 0], np.float32)
        joints[arm[0]] = joints[7] + torso @ offset
        frame = (
            torso
            @ rotation("x", -forward)
            @ rotation("z", side * raised)
            @ rotation("y", -side * turned)
        )
        joints[arm[1]] = joints[arm[0]] + frame @ down * build.upper_arm
        frame = frame @ rotation("x", -bend)
        joints[arm[2]] = joints[arm[1]] + frame @ down * build.forearm
        hands.append(joints[arm[2]] + frame @ down * 0.034)

        aside, forward, turned, bend = (float(a) for a in legs[row])
        joints[leg[0]] = root @ np.array([side * build.hip, 0, 0], np.float32)
        frame = (
            root
            @ rotation("x", -forward)
            @ rotation("z", side * aside)
            @ rotation("y", side * turned)
        )
        joints[leg[1]] = joints[leg[0]] + frame @ down * build.thigh
        frame = frame @ rotation("x", bend)
        joints[leg[2]] = joints[leg[1]] + frame @ down * build.shin
        sole = np.array([0, -0.028, build.foot], np.float32)
        toes.append(joints[leg[2]] + frame @ sole)

    flip = np.array([1, -1, 1], np.float32)  # y up to y down
    return Body(
        build=build,
        joints=joints * flip,
        hands=[h * flip for h in hands],
        toes=[t * flip for t in toes],
        head=centre * flip,
        torso_frame=torso * flip[:, None],
        head_frame=head * flip[:, None],
        yaw=yaw,
        roll=roll,
    )
