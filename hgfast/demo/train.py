"""Train the demo's network: ``python -m hgfast.demo.train``.

A small stacked hourglass learns from figures that worker processes render while it trains.
The same seed and steps give the same figures in the same batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_file
from torch import Tensor

from hgfast.demo.canvas import Array
from hgfast.demo.evaluation import correct, held_out, pck, predict, to_input
from hgfast.demo.figures import OUTSIDE, SIZE, VISIBLE, render_many, training_seed
from hgfast.demo.skeleton import JOINTS, MIRROR
from hgfast.models.hourglass import StackedHourglass, hourglass

Batch = tuple[NDArray[np.uint8], Array, NDArray[np.uint8]]

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "figures_hg1.safetensors"
_CHUNK = 64


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run."""

    steps: int = 3200
    batch: int = 16
    fresh: int = 6  # new figures per step; the rest of a batch is drawn from recent ones
    memory: int = 6144  # how many recent figures are kept
    peak_rate: float = 1e-2
    sigma: float = 1.5  # of the target Gaussians, in heatmap cells
    foreground: float = 10.0  # how much more an error at a Gaussian's peak counts
    seed: int = 0
    stacks: int = 1
    features: int = 64
    depth: int = 4


def targets(joints: Array, visible: NDArray[np.uint8], cells: int, sigma: float) -> Tensor:
    """Heatmaps to learn: a Gaussian of height 1 per joint, (B, K, cells, cells).

    Zero for joints outside the image; occluded ones are to be guessed.
    """
    centre = (torch.from_numpy(joints) + 0.5) * (cells / SIZE) - 0.5
    grid = torch.arange(cells)
    gauss = torch.exp(-((grid - centre[..., None]) ** 2) / (2 * sigma**2))  # (B, K, 2, cells)
    maps = gauss[:, :, 1, :, None] * gauss[:, :, 0, None, :]
    return maps * torch.from_numpy(visible != OUTSIDE)[..., None, None]


def loss_of(maps: Tensor, goal: Tensor, foreground: float) -> Tensor:
    """Squared error summed over a heatmap's cells, mean over heatmaps.

    Nearly all cells are background. Unless the others count more, a network first learns to
    answer zero everywhere, and stays there long.
    """
    return ((1 + foreground * goal) * (maps - goal) ** 2).sum((2, 3)).mean()


def _render_chunk(seeds: Sequence[int]) -> Batch:
    # Half the work of the smoother figures that the network is measured on.
    return render_many(seeds, supersample=1)


def figure_stream(recipe: Recipe, workers: int) -> Generator[Batch, None, None]:
    """Chunks of rendered figures, always in the same order, rendered a few chunks ahead."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        waiting: deque[Any] = deque()
        first = 0
        while True:
            while len(waiting) < workers + 1:
                seeds = [training_seed(recipe.seed, first + i) for i in range(_CHUNK)]
                waiting.append(pool.apply_async(_render_chunk, (seeds,)))
                first += _CHUNK
            yield waiting.popleft().get()


class Memory:
    """The latest figures. A batch is some that were never used, and some that were."""

    def __init__(self, recipe: Recipe, stream: Iterator[Batch]) -> None:
        self._recipe, self._stream = recipe, stream
        self._images = np.empty((recipe.memory, SIZE, SIZE, 3), np.uint8)
        self._joints = np.empty((recipe.memory, len(JOINTS), 2), np.float32)
        self._visible = np.empty((recipe.memory, len(JOINTS)), np.uint8)
        self._rendered = self._used = 0

    def batch(self, rng: np.random.Generator) -> Batch:
        """The next batch, half of it mirrored."""
        recipe = self._recipe
        while self._rendered < self._used + recipe.fresh or self._rendered < recipe.batch:
            chunk = next(self._stream)
            slots = (self._rendered + np.arange(_CHUNK)) % recipe.memory
            self._images[slots], self._joints[slots], self._visible[slots] = chunk
            self._rendered += _CHUNK
        fresh = self._used + np.arange(recipe.fresh)
        self._used += recipe.fresh
        known = min(self._rendered, recipe.memory)
        again = rng.integers(self._rendered - known, self._rendered, recipe.batch - recipe.fresh)
        rows = np.concatenate([fresh, again]) % recipe.memory
        images, joints, visible = self._images[rows], self._joints[rows], self._visible[rows]
        flip = rng.random(recipe.batch) < 0.5
        order = list(MIRROR)
        images[flip] = images[flip, :, ::-1]
        joints[flip] = joints[flip][:, order]
        joints[flip, :, 0] = SIZE - 1 - joints[flip, :, 0]
        visible[flip] = visible[flip][:, order]
        return images, joints, visible


def train(recipe: Recipe, workers: int, console: Console) -> StackedHourglass:
    """Run a recipe; the trained network, in eval mode."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # the rest renders
    rng = np.random.default_rng(recipe.seed)
    model = hourglass(recipe.stacks, recipe.features, 1, recipe.depth, len(JOINTS))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in model.named_parameters():
        if ".heatmap." in name:  # begin with dark heatmaps, which most of the target is
            torch.nn.init.normal_(parameter, std=1e-3)
    optimizer = torch.optim.Adam(model.parameters(), recipe.peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_rate, total_steps=recipe.steps, pct_start=0.1
    )
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # Only to watch: nothing is chosen by it, and the final score is of other figures.
    watched = render_many(held_out(128, start=100_000))
    stream = figure_stream(recipe, workers)
    memory = Memory(recipe, stream)
    with closing(stream), Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=float("nan"))
        smooth = None
        for step in range(1, recipe.steps + 1):
            images, joints, visible = memory.batch(rng)
            x = to_input(images).to(memory_format=torch.channels_last)
            goal = targets(joints, visible, SIZE // 4, recipe.sigma)
            optimizer.zero_grad(set_to_none=True)
            # Intermediate supervision: every stack is told.
            loss = torch.stack([loss_of(maps, goal, recipe.foreground) for maps in model(x)]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            value = float(loss.detach())
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            progress.update(task, advance=1, loss=smooth)
            if step % max(recipe.steps // 10, 1) == 0:
                found = pck(predict(model.eval(), watched[0])[0], *watched[1:])
                progress.console.print(f"step {step}: loss {smooth:.3f}, PCK@0.2 {found:.3f}")
                model.train()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def score(model: StackedHourglass, count: int) -> dict[str, Any]:
    """PCK@0.2 on held-out figures: overall, of visible joints alone, and per joint."""
    images, joints, visible = render_many(held_out(count))
    found = correct(predict(model, images)[0], joints)
    inside = visible != OUTSIDE
    per_joint = {
        name: round(float(found[inside[:, k], k].mean()), 4) for k, name in enumerate(JOINTS)
    }
    return {
        "figures": count,
        "pck@0.2": round(float(found[inside].mean()), 4),
        "pck@0.2 visible joints": round(float(found[visible == VISIBLE].mean()), 4),
        "pck@0.2 per joint": per_joint,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hgfast.demo.train",
        description="Train the demo's network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default, cores = Recipe(), os.cpu_count() or 1
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--held-out", type=int, default=1024, help="figures to measure PCK on")
    parser.add_argument("--workers", type=int, default=cores, help="processes that render")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="a .safetensors file")
    arguments = parser.parse_args(argv)
    recipe = replace(default, steps=arguments.steps, seed=arguments.seed)
    console = Console()
    began = time.monotonic()
    model = train(recipe, arguments.workers, console)
    minutes = (time.monotonic() - began) / 60
    result = score(model, arguments.held_out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, arguments.out)
    record = {
        "command": f"python -m hgfast.demo.train --steps {recipe.steps} --seed {recipe.seed}",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cores": cores,
        "minutes": round(minutes, 1),
        "processor minutes": round(sum(os.times()[:4]) / 60, 1),  # tells more on a busy machine
        "torch": torch.__version__,
        "held out": result,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"PCK@0.2 {result['pck@0.2']:.3f} on {arguments.held_out} held-out figures")
    console.print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
