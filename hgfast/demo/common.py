"""What both halves of the demo use."""

from __future__ import annotations

from pathlib import Path

from hgfast.demo.skeleton import JOINTS
from hgfast.models import StackedHourglass, load_checkpoint

SHIPPED = Path(__file__).parent / "assets" / "figures_hg1.safetensors"


class DemoError(Exception):
    """Something is wrong with what the user gave; the message is one line."""


def load_network(weights: Path | None, stacks: int | None) -> StackedHourglass:
    """The network of a checkpoint file, or the shipped one.

    Raises:
        DemoError: no such file, not a checkpoint, or not the network that was expected.
    """
    path = weights or SHIPPED
    try:
        model = load_checkpoint(path)
    except FileNotFoundError:
        raise DemoError(f"no such weights file: {path}") from None
    except (OSError, ValueError) as error:
        raise DemoError(" ".join(str(error).split())) from error
    found, joints = len(model.heads), int(model.heads[0].heatmap.out_channels)  # type: ignore[union-attr, arg-type]
    if stacks is not None and stacks != found:
        raise DemoError(f"{path} has {found} stack{'s' * (found > 1)}, --stacks says {stacks}")
    if joints != len(JOINTS):
        raise DemoError(f"{path} predicts {joints} joints; the demo draws MPII's {len(JOINTS)}")
    return model


def output_folder(path: Path) -> Path:
    """The folder for pictures, made if need be.

    Raises:
        DemoError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {path}: {error.strerror}") from error
    return path
