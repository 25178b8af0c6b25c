"""The demo without arguments: the shipped network on figures it has never seen."""

from __future__ import annotations

import copy
import functools
import math
import os
import platform
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hgfast
from hgfast._timing import time_alternately
from hgfast.demo.common import load_network, output_folder
from hgfast.demo.evaluation import correct, held_out, pck, predict, to_input
from hgfast.demo.figures import HELD_OUT, OUTSIDE, SIZE, render
from hgfast.models import StackedHourglass
from hgfast.viz import Bars, Row, draw_skeleton, heatmap_overlay, pose_page

# The figures of the picture: consecutive held-out seeds, chosen for the look of the figures
# before any network had seen them.
_SHOWN = HELD_OUT[2034:2040]
_CELL = 272
_PRECISIONS = ("highest", "medium")


@dataclass(frozen=True)
class Run:
    """One way to run a network. ``check`` is None for eager, which is the measure."""

    name: str
    latency: float  # milliseconds
    check: hgfast.Verification | None = None
    accuracy: float = math.nan


@dataclass(frozen=True)
class Result:
    """One network, run in several ways; the first is eager."""

    name: str
    runs: list[Run]


def run_showcase(args: Namespace, console: Console) -> None:
    """Optimise, verify, time and draw.

    Raises:
        DemoError: the weights or the output folder are not usable.
    """
    model = load_network(args.weights, args.stacks)
    folder = output_folder(args.out)
    count = 32 if args.quick else 256
    console.print(
        f"[bold]hgfast {hgfast.__version__}[/], torch {torch.__version__}, "
        f"{_threads()} on {escape(_machine())}",
        highlight=False,
        soft_wrap=True,
    )
    busy = _other_load()
    if busy > 0.5:
        console.print(
            f"[yellow]Other programs are running (load average {busy:.1f}): latencies are "
            "inflated and ratios rough.[/]",
            highlight=False,
            soft_wrap=True,
        )
    figures = [
        render(seed) for seed in track(held_out(count), "rendering figures", console=console)
    ]
    images, joints, visible = (
        np.stack([getattr(figure, name) for figure in figures])
        for name in ("image", "joints", "visible")
    )
    with console.status("small network: optimise, verify, time"):
        small, fast = _measure(
            _describe(model, f"{SIZE}x{SIZE}"),
            model,
            to_input(images[:8]),
            blocks=1 if args.quick else 3,
            accuracy=lambda network: pck(predict(network, images)[0], joints, visible),
        )
    torch.manual_seed(0)
    large_model = hgfast.models.hourglass(stacks=2, features=256).eval()
    with console.status("HG-2, 256 features: optimise, verify, time"):
        large, _ = _measure(
            _describe(large_model, "256x256") + ", random weights",
            large_model,
            torch.rand(1, 3, 256, 256) - 0.5,
            blocks=1 if args.quick else 2,
        )
    console.print(_table(small), _table(large), sep="\n")
    console.print(
        "Latency: median of one image's forward pass. Error: relative L2 against float64.\n"
        "Shift: of heatmap maxima against float64, in heatmap pixels; random weights make noise,\n"
        f"whose maxima may be near-ties. PCK@0.2: {count} held-out figures, 0.2 of the torso.\n",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(hgfast.report(fast)), markup=False, highlight=False, soft_wrap=True)
    target = folder / "figures.png"
    _picture(fast, small, large, count).save(target)
    console.print(f"\nsaved [bold]{escape(str(target))}[/]", soft_wrap=True)


def _measure(
    name: str,
    model: nn.Module,
    x: Tensor,
    blocks: int,
    accuracy: Callable[[nn.Module], float] = lambda model: math.nan,
) -> tuple[Result, nn.Module]:
    """Run a network in every way: latency on the first image of ``x``, errors on all.

    Returns the result and the network optimised for "highest".
    """
    channels_last = copy.deepcopy(model)
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks: dict[str, nn.Module] = {"eager": model, "eager, channels_last": channels_last}
    inputs = [x[:1], x[:1].to(memory_format=torch.channels_last)]
    checks: dict[str, hgfast.Verification] = {}
    for precision in _PRECISIONS:
        fast = hgfast.optimize(model, precision=precision)
        checks[f'hgfast "{precision}"'] = hgfast.verify(model, fast, x)
        networks[f'hgfast "{precision}"'] = fast
        inputs.append(x[:1])
    calls = {
        run: functools.partial(network, one)
        for (run, network), one in zip(networks.items(), inputs, strict=True)
    }
    with torch.inference_mode():
        times = time_alternately(calls, blocks)
    runs = [
        Run(run, times[run], checks.get(run), accuracy(network))
        for run, network in networks.items()
    ]
    return Result(name, runs), networks['hgfast "highest"']


def _table(result: Result) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        title=result.name,
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),  # fits a terminal of 80 columns
    )
    for column in ("run", "latency", "ratio", "error", "shift", "verified", "PCK@0.2"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for run in result.runs:
        check = run.check
        table.add_row(
            run.name,
            f"{run.latency:.2f} ms",
            f"{result.runs[0].latency / run.latency:.2f}x",
            f"{check.rel:.1e}" if check else "",
            f"{check.keypoint_shift:.2f}" if check else "",
            "" if check is None else "[green]ok[/]" if check.ok else "[red]FAILED[/]",
            "" if math.isnan(run.accuracy) else f"{run.accuracy:.4f}",
        )
    return table


def _picture(fast: nn.Module, small: Result, large: Result, count: int) -> Image.Image:
    """Inputs, heatmaps and joints of a few figures, with the latencies below."""
    figures = [render(seed) for seed in _SHOWN]
    images = np.stack([figure.image for figure in figures])
    truth = np.stack([figure.joints for figure in figures])
    with torch.inference_mode():
        heatmaps = fast(to_input(images))[-1].numpy()
    joints, scores = predict(fast, images)
    found = correct(joints, truth)
    seen: list[Image.Image] = []
    heat: list[Image.Image] = []
    drawn: list[Image.Image] = []
    captions: list[str] = []
    for i, (seed, figure) in enumerate(zip(_SHOWN, figures, strict=True)):
        inside = figure.visible != OUTSIDE
        seen.append(Image.fromarray(figure.image).resize((_CELL, _CELL), Image.Resampling.BICUBIC))
        heat.append(heatmap_overlay(seen[-1], heatmaps[i]))
        # The same scene in a higher resolution than the network had, for the reader.
        scale = _CELL / SIZE
        large_image = render(seed, _CELL).image
        picture = draw_skeleton(
            large_image, (truth[i] + 0.5) * scale - 0.5, shown=inside, outline=True
        )
        drawn.append(
            draw_skeleton(
                picture,
                (joints[i] + 0.5) * scale - 0.5,
                shown=scores[i] > 0.1,
                sure=scores[i] > 0.3,
            )
        )
        captions.append(f"{int(found[i][inside].sum())} of {int(inside.sum())} joints")
    before, after = small.runs[0].accuracy, small.runs[2].accuracy
    return pose_page(
        "hgfast: the same joints, sooner",
        [
            Row(f"input\n{SIZE} x {SIZE}", seen),
            Row("heatmaps\n(hgfast)", heat),
            Row("joints", drawn, captions),
        ],
        subtitle=f"PCK@0.2 on {count} held-out figures: {before:.4f} eager, {after:.4f} hgfast",
        charts=[
            Bars(f"{result.name}: latency", [(run.name, run.latency) for run in result.runs])
            for result in (small, large)
        ],
        footer=f"{_machine()}, torch {torch.__version__}, {_threads()}, "
        "batch 1, median. Skeletons: warm is the person's right, cool the left, hollow a weak "
        "peak, thin white the truth.\nA caption counts the joints within 0.2 torsos of the truth.",
        cell=_CELL,
    )


def _describe(model: StackedHourglass, size: str) -> str:
    features = int(model.stem.conv.out_channels) * 4
    parameters = sum(p.numel() for p in model.parameters())
    count = f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"
    return f"HG-{len(model.heads)}, {features} features, {size} ({count} parameters)"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def _other_load() -> float:
    """Programs that wanted a core over the last minute, on average."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on every system
        return 0.0


def _machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
