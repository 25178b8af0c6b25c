"""``python -m hgfast demo``: see a network optimised, checked, timed and drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from hgfast.demo.common import DemoError
from hgfast.demo.photos import run_photos
from hgfast.demo.showcase import run_showcase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE",
        help="photos to find a person in; without any, figures that the demo renders",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="a checkpoint of a stacked hourglass with MPII's 16 joints "
        "(default: the small network that ships with hgfast, trained on rendered figures only)",
    )  # fmt: skip
    parser.add_argument(
        "--stacks", type=int, metavar="N", help="stacks the checkpoint must have, as a check"
    )
    parser.add_argument(
        "--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"),
        help="where the person is, in pixels (default: the photo's centre square)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("hgfast-demo"), metavar="DIR",
        help="where pictures go (default: ./hgfast-demo)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="fewer figures and fewer timed calls; rougher numbers"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 2 after one line that says what is wrong with the arguments."""
    # Into a file or a pipe, rich would cut tables to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    try:
        if args.images:
            run_photos(args, console)
        else:
            run_showcase(args, console)
    except DemoError as error:
        print(f"hgfast demo: error: {error}", file=sys.stderr)
        return 2
    return 0
