"""Names for groups of steps, as people know them: what the report calls a Plan's parts.

Nothing is run differently for it. A block is found by how its steps hang together. Hourglasses hold
other blocks; apart from them each step is in one block at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hgfast.patterns.match import common_name
from hgfast.plan import Add, Block, Bottleneck, Concat, Conv, Pool, Step, UpsampleAdd


def name_blocks(steps: Sequence[Step]) -> tuple[Block, ...]:
    """The blocks among these steps: hourglasses, then the others, both in order of execution."""
    by_output = {step.output: step for step in steps}
    taken: set[int] = set()
    blocks = []
    for step in reversed(steps):  # from what closes a block upwards
        for kind, members in _candidates(step, by_output):
            if taken.isdisjoint(members):
                taken |= members
                blocks.append(_block(kind, members, steps))
                break
    hourglasses = [_block("hourglass", members, steps) for members in _hourglasses(steps)]
    return (*hourglasses, *reversed(blocks))


def _block(kind: str, members: set[int], steps: Sequence[Step]) -> Block:
    inside = [step for step in steps if step.output in members]
    parts = [part for step in inside for part in step.parts]
    name = common_name(*parts) if parts else inside[-1].name
    return Block(name, kind, tuple(step.output for step in inside))


def _candidates(step: Step, steps: dict[int, Step]) -> Iterator[tuple[str, set[int]]]:
    """What a step may close: a kind and its members, by output."""
    if isinstance(step, Bottleneck):
        yield step.name_of_block, {step.output}
    elif isinstance(step, Conv) and step.relu_sum and len(step.inputs) == 2:
        yield from _residual(step, steps)
        yield "fuse layer", {step.output, *_feeders(step, steps)}
    elif isinstance(step, Add) and step.relu and [*_feeders(step, steps)]:
        yield "fuse layer", {step.output, *_feeders(step, steps)}
    elif isinstance(step, Concat) and step.add:
        yield from _multi_scale(step, steps)
    elif isinstance(step, UpsampleAdd) and (step.relu or len(step.factors) > 1):
        yield "fuse layer", {step.output, *_feeders(step, steps)}
    elif isinstance(step, Conv) and step.conv.transposed and len(step.inputs) == 1:
        chain = {step.output}
        above = steps.get(step.inputs[0])
        while isinstance(above, Conv) and above.conv.transposed and len(above.inputs) == 1:
            chain.add(above.output)
            above = steps.get(above.inputs[0])
        yield "deconvolution head", chain


def _residual(last: Conv, steps: dict[int, Step]) -> Iterator[tuple[str, set[int]]]:
    """Convolutions upwards from the one that adds the shortcut, up to where the shortcut began."""
    shortcut, start = steps.get(last.inputs[1]), last.inputs[1]
    members = {last.output}
    chain = [last]

    def climb(start: int) -> bool:
        while chain[-1].inputs[0] != start:
            above = steps.get(chain[-1].inputs[0])
            if not isinstance(above, Conv) or len(above.inputs) == 2 or len(chain) == 3:
                return False
            chain.append(above)
        return True

    if not climb(start):
        if not isinstance(shortcut, Conv) or len(shortcut.inputs) == 2 or shortcut.relu:
            return
        del chain[1:]
        members.add(shortcut.output)
        if not climb(shortcut.inputs[0]):
            return
    members |= {step.output for step in chain}
    sizes = [step.conv.kernel_size for step in reversed(chain)]
    if sizes == [(3, 3), (3, 3)]:
        yield "basic block", members
    elif sizes == [(1, 1), (3, 3), (1, 1)]:
        yield f"bottleneck x{chain[0].conv.channels[1] // chain[-1].conv.channels[1]}", members
    else:
        yield "residual block", members


def _multi_scale(last: Concat, steps: dict[int, Step]) -> Iterator[tuple[str, set[int]]]:
    """Convolutions each of which reads the one before, concatenated, plus the shortcut."""
    *parts, shortcut = last.inputs
    chain = [step for step in map(steps.get, parts) if isinstance(step, Conv)]
    if len(chain) != len(parts):
        return
    if any(step.inputs[0] != before for step, before in zip(chain[1:], parts, strict=False)):
        return
    members = {last.output, *parts}
    if shortcut != chain[0].inputs[0]:
        project = steps.get(shortcut)
        if not isinstance(project, Conv) or project.inputs[0] != chain[0].inputs[0]:
            return
        members.add(shortcut)
    yield "multi-scale block", members


def _feeders(last: Step, steps: dict[int, Step]) -> Iterator[int]:
    """The convolutions that bring other resolutions to the sum that a step ends in."""
    for number in last.inputs:
        step = steps.get(number)
        if not isinstance(step, Conv) or step.relu_sum:
            continue
        if step.conv.kernel_size == (1, 1) or step.conv.stride != (1, 1):
            yield number
            yield from _feeders(step, steps)


def _hourglasses(steps: Sequence[Step]) -> list[set[int]]:
    """Steps from where a lower resolution branches off to where it is joined again, outermost."""
    above: dict[int, set[int]] = {}  # what each value is computed from
    order = {step.output: i for i, step in enumerate(steps)}
    by_output = {step.output: step for step in steps}
    found: list[set[int]] = []
    for step in steps:
        above[step.output] = set(step.inputs).union(*(above.get(n, ()) for n in step.inputs))
        if not _is_join(step):
            continue
        low, skip = step.inputs if isinstance(step, UpsampleAdd) else step.inputs[::-1]
        shared = (above.get(low, set()) | {low}) & (above.get(skip, set()) | {skip})
        fork = max(shared, key=lambda number: order.get(number, -1), default=None)
        if fork is None:
            continue
        inside = {
            number
            for number in (*above[step.output], step.output)
            if number in order and (number == step.output or fork in above[number])
        }
        if any(_descends(by_output[number]) for number in inside & (above.get(low, set()) | {low})):
            found = [other for other in found if not other <= inside]
            found.append(inside)
    return found


def _is_join(step: Step) -> bool:
    """Whether a step adds one map of half the size."""
    if isinstance(step, UpsampleAdd):
        return step.factors == (2,) and not step.relu
    if isinstance(step, Bottleneck):
        return len(step.inputs) == 2
    return isinstance(step, Conv) and step.conv.transposed and len(step.inputs) == 2


def _descends(step: Step) -> bool:
    strided = isinstance(step, Conv) and step.conv.stride != (1, 1) and not step.conv.transposed
    return strided or isinstance(step, Pool)
