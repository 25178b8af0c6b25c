"""Chains of residual blocks that a Plan has below some level of an hourglass: one launch each.

Below 16x16 pixels a block is too small for a GPU, and its launch takes longer than its work. All
that lies there, pooling, blocks and upsampled sums, can be one kernel, whose cluster of blocks of
threads keeps the maps in shared memory. What is found here can run so where the maps are small
enough, which a call's shape decides; whether it does, :mod:`hgfast.runtime.evidence` says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from hgfast.plan import Bottleneck, Step

#: Of a chain, as the kernel has room for: SubtreeParams::kMostSteps in csrc/cuda/hopper_latency.h.
MOST_STEPS = 8
#: Rows and columns of the largest map of a chain.
MOST_PIXELS = 8
#: Images: clusters of eight blocks that find room at once on an H200's 132 multiprocessors. More
#: would take turns, while the blocks of one level, launched together, share the whole GPU.
MOST_IMAGES = 16


@dataclass(frozen=True)
class Link:
    """What a step of a chain reads.

    Attributes:
        source: the step whose result it is, counted in the chain; -1: what the chain reads.
        pool: whether the step sees the 2x2 maximum of that.
        low: the step whose result is upsampled and added; -1: none.
    """

    source: int
    pool: bool
    low: int


@dataclass(frozen=True)
class Subtree:
    """Steps in a row, of which nobody else reads a result but the last one's.

    Attributes:
        steps: they, without the poolings between them.
        links: what each reads.
        reads: the value that the first one pools.
    """

    steps: tuple[Bottleneck, ...]
    links: tuple[Link, ...]
    reads: int

    @property
    def output(self) -> int:
        """The value it gives."""
        return self.steps[-1].output

    def fits(self, batch: int, height: int, width: int) -> bool:
        """Whether the kernel takes it for images whose first map, pooled, is of that size."""
        return batch <= MOST_IMAGES and max(height, width) <= MOST_PIXELS


def find(
    steps: Sequence[Step],
    every: Sequence[Step],
    pools: Mapping[int, int],
    outputs: Collection[int],
    fits: Callable[[Bottleneck], bool],
) -> list[Subtree]:
    """The chains among a Plan's steps, of at least two; the larger before those inside it.

    Args:
        steps: in order, without the poolings that are a block's prologue; of several steps that
            are one launch the first.
        every: all of them.
        pools: those, as the value they give -> the value they pool.
        outputs: the Plan's.
        fits: whether the kernel takes a block.
    """
    found = []
    for first, step in enumerate(steps):
        if not (isinstance(step, Bottleneck) and step.inputs[0] in pools and len(step.inputs) == 1):
            continue
        chain = _chain(steps[first : first + MOST_STEPS], pools, fits)
        count = len(chain)
        while count > 1 and not _is_closed([b for b, _ in chain[:count]], every, pools, outputs):
            count -= 1
        if count > 1:
            blocks, links = zip(*chain[:count], strict=True)
            found.append(Subtree(blocks, links, pools[step.inputs[0]]))
    return found


def _chain(
    steps: Sequence[Step], pools: Mapping[int, int], fits: Callable[[Bottleneck], bool]
) -> list[tuple[Bottleneck, Link]]:
    """The blocks that read nothing but what the first one reads and what they give."""
    numbers: dict[int, int] = {}
    chain: list[tuple[Bottleneck, Link]] = []
    for step in steps:
        if not isinstance(step, Bottleneck) or not fits(step):
            break
        x, *others = step.inputs
        source = numbers.get(pools.get(x, x))
        low = numbers.get(others[0]) if others else -1
        if (chain and source is None) or low is None:
            break
        chain.append((step, Link(-1 if source is None else source, x in pools, low)))
        numbers[step.output] = len(numbers)
    return chain


def _is_closed(
    chain: Sequence[Step],
    every: Sequence[Step],
    pools: Mapping[int, int],
    outputs: Collection[int],
) -> bool:
    """Whether of these steps nobody else reads a result but the last one's."""
    inside = {step.output for step in chain}
    hidden = inside - {chain[-1].output}
    if not hidden.isdisjoint(outputs):
        return False
    # A pooling that is a prologue counts as its one reader.
    return not any(
        pools.get(number, number) in hidden
        for step in every
        if step.output not in inside and step.output not in pools
        for number in step.inputs
    )
