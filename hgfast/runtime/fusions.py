"""Steps of a Plan that have one kernel together, or one made for their place in the network.

What is found here can run in these kernels. On a GPU it is for :mod:`hgfast.runtime.evidence` to
say whether it does. On a CPU it always does: tests show that the results are the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from hgfast.plan import Bottleneck, Conv, Pool, Remerge, Step


def pooled_blocks(
    steps: Sequence[Step], outputs: Collection[int], fits: Callable[[Bottleneck], bool]
) -> dict[int, int]:
    """The 2x2 maxima that a block can take itself of what it reads: nobody else reads them.

    Args:
        steps: of a Plan.
        outputs: the values wanted at its end.
        fits: whether a kernel that pools takes the block.

    Returns:
        By the number of the maximum, that of the value it is taken of.
    """
    readers = Counter(number for step in steps for number in step.inputs)
    readers.update(outputs)
    reading = {step.inputs[0] for step in steps if isinstance(step, Bottleneck) and fits(step)}
    return {
        step.output: step.inputs[0]
        for step in steps
        if _is_half_maximum(step) and step.output in reading and readers[step.output] == 1
    }


def pooling_blocks(steps: Sequence[Step], outputs: Collection[int]) -> dict[int, int]:
    """The blocks whose result only a 2x2 maximum reads: they can give that alone.

    Args:
        steps, outputs: as above.

    Returns:
        By the number of the block's result, that of the maximum.
    """
    readers = Counter(number for step in steps for number in step.inputs)
    readers.update(outputs)
    blocks = {s.output for s in steps if isinstance(s, Bottleneck) and len(s.inputs) == 1}
    return {
        step.inputs[0]: step.output
        for step in steps
        if _is_half_maximum(step) and step.inputs[0] in blocks and readers[step.inputs[0]] == 1
    }


def _is_half_maximum(step: Step) -> bool:
    return isinstance(step, Pool) and step.mode == "max" and step.is_half


#: Channels that a GPU's kernel for the stem makes: a multiple of 16, up to this.
MOST_STEM_CHANNELS = 64


def is_stem(step: Step) -> bool:
    """Whether a GPU's kernel for the stem takes it: 7x7/2 from 3 channels, ReLU behind it."""
    if not isinstance(step, Conv) or len(step.inputs) != 1:
        return False
    conv, (image, out) = step.conv, step.conv.channels
    return (
        (conv.kernel_size, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
        and (conv.dilation, conv.groups, conv.transposed) == ((1, 1), 1, False)
        and step.norm_before is None
        and step.relu
        and not step.relu_sum
        and image == 3
        and out % 16 == 0
        and out <= MOST_STEM_CHANNELS
    )


@dataclass(frozen=True)
class Head:
    """What follows an hourglass, a chain for each pixel.

    ``z = relu(features(y))``, which nothing else reads; ``heatmaps(z)``; ``merge(z) [+ x]``, the
    way into the next stack. Of the last two at least one is wanted.
    """

    features: Conv
    heatmaps: Conv | None
    merge: Remerge | None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for step in (self.features, self.heatmaps, self.merge) if step)

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """In, middle, joints, out; 0 for what is not wanted."""
        joints = self.heatmaps.conv.channels[1] if self.heatmaps else 0
        out = self.merge.direct.channels[1] if self.merge else 0
        return *self.features.conv.channels, joints, out

    @property
    def reads(self) -> tuple[int, ...]:
        """The values it reads: y, and x if there is one."""
        return self.features.inputs + (self.merge.inputs[1:] if self.merge else ())


def heads(
    steps: Sequence[Step],
    inputs: Collection[int],
    outputs: Collection[int],
    fits: Callable[[Head], bool],
) -> list[Head]:
    """The heads among a Plan's steps that ``fits`` lets pass.

    Args:
        steps: in order.
        inputs, outputs: the Plan's, by value number.
        fits: whether a kernel takes the head.
    """
    found = []
    known = set(inputs)
    for step in steps:
        if _is_pointwise(step) and step.relu and step.output not in outputs:
            readers = [other for other in steps if step.output in other.inputs]
            head = _head_of(step, readers)
            if head and known.issuperset(head.reads) and fits(head):
                found.append(head)
        known.add(step.output)
    return found


def _head_of(features: Conv, readers: Sequence[Step]) -> Head | None:
    """The head that begins with a convolution, if all who read its result belong to it."""
    heatmaps: Conv | None = None
    merge: Remerge | None = None
    for step in readers:
        if isinstance(step, Remerge) and merge is None and features.output not in step.inputs[1:]:
            merge = step
        elif _is_pointwise(step) and heatmaps is None and not step.relu:
            heatmaps = step
        else:
            return None
    return Head(features, heatmaps, merge) if readers else None


def _is_pointwise(step: Step) -> TypeGuard[Conv]:
    """Whether a step is a 1x1 convolution of one map, with nothing before it."""
    return (
        isinstance(step, Conv)
        and len(step.inputs) == 1
        and step.conv.is_pointwise
        and step.norm_before is None
        and not step.relu_sum
    )
