"""Names for groups of steps, as people know them: what the report calls a Plan's parts.

Nothing is run differently for it. A block is found by how its steps hang together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hgfast.patterns.match import common_name
from hgfast.plan import Block, Bottleneck, Concat, Conv, Step, UpsampleAdd


def name_blocks(steps: Sequence[Step]) -> tuple[Block, ...]:
    """The blocks among these steps, each step in one at most, in order of execution."""
    by_output = {step.output: step for step in steps}
    taken: set[int] = set()
    blocks = []
    for step in reversed(steps):  # from what closes a block upwards
        for kind, members in _candidates(step, by_output):
            if not taken.isdisjoint(member.output for member in members):
                continue
            taken.update(member.output for member in members)
            ordered = [other for other in steps if other in members]
            parts = [part for member in members for part in member.parts]
            name = common_name(*parts) if parts else step.name
            blocks.append(Block(name, kind, tuple(other.output for other in ordered)))
            break
    return tuple(reversed(blocks))


def _candidates(step: Step, steps: dict[int, Step]) -> Iterator[tuple[str, list[Step]]]:
    if isinstance(step, Bottleneck):
        yield step.title.partition(" + ")[0], [step]
    elif isinstance(step, Conv) and step.relu_sum and len(step.inputs) == 2:
        yield from _residual(step, steps)
    elif isinstance(step, Concat) and step.add:
        yield from _multi_scale(step, steps)
    elif isinstance(step, UpsampleAdd) and step.relu:
        yield "fuse layer", [step]
    elif isinstance(step, Conv) and step.conv.transposed:
        yield "deconvolution", [step]


def _residual(last: Conv, steps: dict[int, Step]) -> Iterator[tuple[str, list[Step]]]:
    """Convolutions upwards from the one that adds the shortcut, up to where the shortcut began."""
    shortcut = steps.get(last.inputs[1])
    start = last.inputs[1]
    project: list[Step] = []
    if isinstance(shortcut, Conv) and len(shortcut.inputs) == 1 and not shortcut.relu:
        project, start = [shortcut], shortcut.inputs[0]
    chain: list[Step] = [last]
    while chain[-1].inputs[0] != start and len(chain) < 3:
        above = steps.get(chain[-1].inputs[0])
        if not isinstance(above, Conv) or len(above.inputs) == 2:
            return
        chain.append(above)
    if chain[-1].inputs[0] != start:
        return
    sizes = [step.conv.kernel_size for step in reversed(chain) if isinstance(step, Conv)]
    if sizes == [(3, 3), (3, 3)]:
        yield "basic block", [*chain, *project]
    elif sizes == [(1, 1), (3, 3), (1, 1)]:
        yield "bottleneck (post-activation)", [*chain, *project]
    elif sizes:
        yield "residual block", [*chain, *project]


def _multi_scale(last: Concat, steps: dict[int, Step]) -> Iterator[tuple[str, list[Step]]]:
    """Convolutions each of which reads the one before, concatenated, plus the shortcut."""
    *parts, shortcut = last.inputs
    members: list[Step] = [last]
    for number in parts:
        step = steps.get(number)
        if not isinstance(step, Conv):
            return
        members.append(step)
    source = steps.get(shortcut)
    first = members[1]
    if shortcut != first.inputs[0]:
        if not isinstance(source, Conv) or source.inputs[0] != first.inputs[0]:
            return
        members.append(source)
    if all(
        after.inputs[0] == before for after, before in zip(members[2:], parts[:-1], strict=False)
    ):
        yield "multi-scale block", members
