"""Which blocks of a Plan can be one launch: hgfast/runtime/subtrees.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hgfast.models import hourglass
from hgfast.plan import Bottleneck, Plan, Pool, Step
from hgfast.recognition import recognise
from hgfast.runtime import subtrees
from hgfast.runtime.subtrees import Link


def parts(plan: Plan) -> tuple[list[Step], dict[int, int]]:
    """A Plan's steps without poolings, and these."""
    pools = {step.output: step.inputs[0] for step in plan.steps if isinstance(step, Pool)}
    return [step for step in plan.steps if step.output not in pools], pools


def found(plan: Plan, outputs: tuple[int, ...] = ()) -> list[subtrees.Subtree]:
    steps, pools = parts(plan)
    return subtrees.find(steps, plan.steps, pools, outputs, lambda block: block.project is None)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_what_lies_below_a_level_of_an_hourglass(depth: int) -> None:
    plan = recognise(hourglass(stacks=2, features=64, blocks=1, depth=depth, joints=3))
    chains = found(plan)
    lengths = [len(chain.steps) for chain in chains]
    # Of each stack: the innermost level is three blocks, the one above three more.
    assert lengths.count(3) == 2
    assert lengths.count(6) == 2
    assert max(lengths) <= subtrees.MOST_STEPS
    six = next(chain for chain in chains if len(chain.steps) == 6)
    assert [link.pool for link in six.links] == [True, True, False, False, False, False]
    assert six.links[0] == Link(-1, True, -1)
    # low1 -> pooled: low1, low2, low3 -> the upper branch adds the last -> low3
    assert six.links[1:] == (
        Link(0, True, -1),
        Link(1, False, -1),
        Link(2, False, -1),
        Link(0, False, 3),
        Link(4, False, -1),
    )
    assert six.output == six.steps[-1].output
    for chain in chains:
        for step, link in zip(chain.steps, chain.links, strict=True):
            _, pools = parts(plan)
            x = pools.get(step.inputs[0], step.inputs[0])
            assert x == (chain.reads if link.source < 0 else chain.steps[link.source].output)
            if link.low >= 0:
                assert step.inputs[1] == chain.steps[link.low].output


def test_a_result_that_others_want_ends_a_chain() -> None:
    plan = recognise(hourglass(stacks=1, features=64, blocks=1, depth=2, joints=3))
    whole = max(found(plan), key=lambda chain: len(chain.steps))
    wanted = whole.steps[3].output
    shorter = [c for c in found(plan, (wanted,)) if c.steps[0] is whole.steps[0]]
    assert all(wanted not in {step.output for step in c.steps[:-1]} for c in shorter)
    assert all(len(c.steps) < len(whole.steps) for c in shorter)


def test_a_reader_inside_another_launch_ends_a_chain() -> None:
    """What follows an hourglass is one launch, whose later steps read x too."""
    plan = recognise(hourglass(stacks=1, features=64, blocks=1, depth=2, joints=3))
    whole = max(found(plan), key=lambda chain: len(chain.steps))
    steps, pools = parts(plan)
    wanted = whole.steps[3].output
    later = replace(steps[-1], inputs=(*steps[-1].inputs, wanted))
    chains = subtrees.find(steps, (*plan.steps, later), pools, (), lambda b: b.project is None)
    assert all(wanted not in {step.output for step in c.steps[:-1]} for c in chains)


def test_a_block_that_does_not_fit_ends_a_chain() -> None:
    plan = recognise(hourglass(stacks=1, features=64, blocks=1, depth=2, joints=3))
    whole = max(found(plan), key=lambda chain: len(chain.steps))
    steps, pools = parts(plan)
    bad = whole.steps[2]
    chains = subtrees.find(
        steps, plan.steps, pools, (), lambda b: b.project is None and b is not bad
    )
    assert all(bad not in chain.steps for chain in chains)
    assert not subtrees.find(steps, plan.steps, pools, (), lambda _: False)


def test_only_small_maps_of_few_images_fit() -> None:
    plan = recognise(hourglass(stacks=1, features=64, blocks=1, depth=2, joints=3))
    chain = found(plan)[0]
    assert isinstance(chain.steps[0], Bottleneck)
    assert chain.fits(1, 8, 8)
    assert chain.fits(16, 2, 7)
    assert not chain.fits(17, 8, 8)
    assert not chain.fits(1, 8, 9)
