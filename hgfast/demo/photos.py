"""The demo on photos: crop, normalise, run, draw."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hgfast
from hgfast.demo.canvas import Array
from hgfast.demo.common import DemoError, load_network, output_folder
from hgfast.demo.evaluation import to_input, to_pixels
from hgfast.demo.figures import SIZE
from hgfast.demo.skeleton import JOINTS
from hgfast.viz import Row, draw_skeleton, heatmap_overlay, pose_page

# The heatmap peaks above which a joint is drawn at all, and drawn full rather than hollow.
_SHOWN, _SURE = 0.05, 0.3
_CELL = 560  # a picture's width on the page


def run_photos(args: Namespace, console: Console) -> None:
    """Find a person in each photo; one picture each.

    Raises:
        DemoError: an image, the box or the weights are not usable.
    """
    photos = [(path, _open(path)) for path in args.images]
    model = load_network(args.weights, args.stacks)
    if args.weights is None:
        console.print("No --weights: using the shipped network, trained on rendered figures only.")
    size = SIZE if args.weights is None else 256
    folder = output_folder(args.out)
    fast = hgfast.optimize(model)
    taken: set[str] = set()
    for path, photo in photos:
        box = square_box(photo.size, args.box)
        crop = np.asarray(photo.crop(box).resize((size, size), Image.Resampling.LANCZOS))
        with torch.inference_mode():
            heatmaps = fast(to_input(crop[None]))[-1].float()
            coords, scores = hgfast.decode(heatmaps)
        scale = (box[2] - box[0]) / size
        pixels = to_pixels(coords[0], heatmaps.shape[-1], size).numpy()
        joints = (pixels + 0.5) * scale - 0.5 + np.array(box[:2], np.float32)
        score = scores[0].numpy()

        _print_joints(console, path, joints, score)
        target = folder / _name(path, taken)
        drawn = draw_skeleton(photo, joints, shown=score > _SHOWN, sure=score > _SURE)
        large = Image.fromarray(crop).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
        heat = heatmap_overlay(large, heatmaps[0].numpy())
        page = pose_page(
            path.name,
            [Row("", [drawn, heat])],
            subtitle=f"{int((score > _SURE).sum())} of {len(JOINTS)} joints peak above {_SURE}",
            footer="warm: the person's right   cool: left   hollow: a weak peak",
            cell=_CELL,
            text=20,
        )
        page.save(target)
        console.print(f"saved [bold]{escape(str(target))}[/]", soft_wrap=True)


def square_box(
    size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> tuple[int, int, int, int]:
    """The square to crop, (left, top, right, bottom): a photo's centre, or around a box.

    The square may reach beyond the photo; what it finds there is black, as in bearpaw's crop.

    Raises:
        DemoError: the box is empty or does not touch the photo.
    """
    width, height = size
    x, y, w, h = box or (0.0, 0.0, float(width), float(height))
    if not (w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0):
        raise DemoError(
            f"--box {x:g} {y:g} {w:g} {h:g} is not inside an image of {width} x {height} pixels"
        )
    side = max(w, h) if box else min(w, h)
    left, top = round(x + (w - side) / 2), round(y + (h - side) / 2)
    side = max(round(side), 1)
    return left, top, left + side, top + side


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DemoError(f"no such image: {path}") from None
    except UnidentifiedImageError:
        raise DemoError(f"not an image: {path}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DemoError(f"cannot read {path}: {error}") from error


def _name(path: Path, taken: set[str]) -> str:
    """A file name of its own for each picture, also where two photos share one."""
    name, count = f"{path.stem}-pose.png", 1
    while name in taken:
        count += 1
        name = f"{path.stem}-pose-{count}.png"
    taken.add(name)
    return name


def _print_joints(console: Console, path: Path, joints: Array, scores: Array) -> None:
    table = Table(title=escape(str(path)), title_justify="left")
    for column in ("joint", "x", "y", "score"):
        table.add_column(column, justify="left" if column == "joint" else "right")
    for name, (x, y), score in zip(JOINTS, joints, scores, strict=True):
        found = score > _SHOWN
        table.add_row(
            name, f"{x:.1f}" if found else "-", f"{y:.1f}" if found else "-", f"{score:.2f}"
        )
    console.print(table)
