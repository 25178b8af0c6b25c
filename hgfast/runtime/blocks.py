"""A residual block on a GPU: its kernels, packed, and which of them runs for a shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hgfast.runtime import evidence


@dataclass(frozen=True)
class Rule:
    """When a kernel runs a block.

    Attributes:
        kernel: "portable", or a feature of :data:`hgfast.runtime.evidence.FEATURES`, which also
            knows what speaks for it.
        least: the work there must be, in tiles of 16x16 pixels of the whole batch.
        because: the argument, predicted as long as the feature has no evidence.
    """

    kernel: str
    least: int
    because: str


#: The first rule that holds, and whose kernel is there, decides.
RULES = (
    Rule("throughput", 132, "a tile for each multiprocessor of an H200: fewer leave some idle"),
    Rule("portable", 132, "so much work for a block that the kernel above does not take"),
    Rule("latency", 0, "below, blocks of a cluster share a tile and its weights"),
    Rule("portable", 0, "everything else, and every other GPU"),
)

#: An upper branch whose last block has fewer tiles than this runs beside the lower one, where that
#: feature is switched on: half of an H200's multiprocessors, at a tile each. The lower branch has a
#: quarter of its pixels, and so has the next upper one, so that there is work for less than the
#: whole GPU. The kernels cut so little into finer pieces, which spend their time on weights and
#: barriers; those of two branches can share multiprocessors. With more work they only take them
#: from each other, and the join, then a launch of its own, is not paid for. An argument, not a
#: measurement.
BESIDE_BELOW = 66


def tiles(batch: int, height: int, width: int) -> int:
    """Tiles of 16x16 pixels that cover a batch of maps."""
    return batch * -(-height // 16) * -(-width // 16)


def runs_beside(batch: int, height: int, width: int) -> bool:
    """Whether an upper branch with a result of that shape leaves room for what runs beside it."""
    return tiles(batch, height, width) < BESIDE_BELOW


class Block:
    """A residual block, its weights packed for every kernel that may run it.

    Args:
        portable: packs for the kernel of all GPUs.
        others: likewise for those of one architecture, by name; the channels fit them, and they
            are switched on.
    """

    def __init__(
        self, portable: Callable[[], Any], others: Mapping[str, Callable[[], Any]]
    ) -> None:
        self._kernels = {"portable": portable()} | {name: pack() for name, pack in others.items()}
        self._rules = [rule for rule in RULES if rule.kernel in self._kernels]

    @property
    def names(self) -> tuple[str, ...]:
        """Its kernels, in the order in which they are asked."""
        return tuple(dict.fromkeys(rule.kernel for rule in self._rules))

    def kernel(self, name: str) -> Any:
        """One of its kernels, packed."""
        return self._kernels[name]

    def tensors(self) -> list[Tensor]:
        """The packed weights."""
        return [tensor for kernel in self._kernels.values() for tensor in kernel.tensors()]

    def choose(self, batch: int, height: int, width: int) -> str:
        """The kernel for a result of that shape."""
        work = tiles(batch, height, width)
        return next(rule.kernel for rule in self._rules if work >= rule.least)

    def run(
        self, x: Tensor, low: Tensor | None, pool: bool, pooled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block of x (B, C, H, W), or with ``pool`` of its 2x2 maximum.

        Args:
            x: what the block reads, in the kernels' dtype.
            low: (B, out, H / 2, W / 2), added upsampled; or None.
            pool: whether the block sees the 2x2 maximum of x.
            pooled: whether the 2x2 maximum of the result is wanted too.

        Returns:
            The result, channels_last, and its maximum where a kernel gives that beside it.
        """
        batch, _, height, width = x.shape
        if pool:
            height, width = height // 2, width // 2
        name = self.choose(batch, height, width)
        kernel = self._kernels[name]
        if name != "throughput":
            result: Tensor = kernel.run(x, low, pool)
            return result, None
        if pool:  # the block in front did not, being another kernel's, or there was none
            x = F.max_pool2d(x, 2)
        both: tuple[Tensor, Tensor | None] = kernel.run(x, low, pooled and min(height, width) > 1)
        return both


def enabled(kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Of kernels by feature, those that are there and switched on."""
    return {
        name: kernel
        for name, kernel in kernels.items()
        if kernel is not None and evidence.is_enabled(name)
    }
