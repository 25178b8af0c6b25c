"""Skip branches beside the rest: which launches can run at the same time, and what waits for what.

In an hourglass ``y = upper(x) + upsample(lower(x))``. As one launch, the last block of the upper
branch with the sum behind it waits for the lower branch. Apart, the upper branch needs only x, and
what waits for both is a join, a launch that only adds. So a chain of launches becomes several
lanes; lane 0 is the one that the inputs come on, and every join is on it.

How many lanes: as many as branches are open at once, which is the depth of the hourglass. One side
lane would put the branches one behind the other, the outermost and largest first, and that one is
wanted last. In a CUDA graph a lane is not a thing but an order; more of them cost nothing there.

Nothing here knows a device. Values are numbers, as in a Plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    """What a launch reads and gives.

    Attributes:
        gives: the values it makes.
        reads: the values it reads.
        low: of ``reads``, the one that is added behind everything else, so that the rest could
            run without it; None if there is none.
        movable: whether it may run on another lane than 0.
    """

    gives: tuple[int, ...]
    reads: tuple[int, ...]
    low: int | None = None
    movable: bool = False

    @property
    def upper_reads(self) -> tuple[int, ...]:
        """What it reads without ``low``."""
        return tuple(number for number in self.reads if number != self.low)


@dataclass(frozen=True)
class Turn:
    """One launch of a schedule.

    Attributes:
        index: of the launch.
        part: "whole"; "upper", without what is added at the end; or "join", that sum.
        lane: where it runs, behind all earlier turns of the same lane.
        gives: the values it makes; that of an "upper" is ``upper_value`` of the launch's.
        reads: the values it reads; of a "join" (low, upper).
        waits: turns of other lanes that have to be over first. BEGIN is what came before them all.
        dead: values that may be dropped once this turn is enqueued: nobody reads them any more,
            and the lane on which they were made is behind all who did. Who reuses memory in the
            order of a lane, as torch's allocator does, writes to none that is still read.
    """

    index: int
    part: str
    lane: int
    gives: tuple[int, ...]
    reads: tuple[int, ...]
    waits: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Branch:
    """What runs beside the rest.

    Attributes:
        place: the launch behind which it can begin, or BEGIN.
        members: the launches that only it needs, in front of the upper part itself.
    """

    place: int
    members: tuple[int, ...]


#: Stands in ``Turn.waits`` for all that lane 0 was given before the first turn.
BEGIN = -1


def upper_value(output: int) -> int:
    """The number of what a launch gives before its sum."""
    return ~output


def schedule(
    launches: Sequence[Launch], outputs: Collection[int], wanted: Callable[[Launch], bool]
) -> tuple[Turn, ...]:
    """The launches in lanes, in an order in which they can be enqueued.

    What is on lane 0 behind the last turn comes behind all of them: each side lane ends in a join.

    Args:
        launches: in an order of execution. A value that none gives is there before them.
        outputs: values that stay.
        wanted: whether a launch with a ``low`` is to be split, if that puts anything beside it.
    """
    branches = _branches(launches, outputs, wanted)
    return _with_deaths(_with_waits(_in_lanes(launches, branches)), outputs)


def _branches(
    launches: Sequence[Launch], outputs: Collection[int], wanted: Callable[[Launch], bool]
) -> dict[int, _Branch]:
    """The launches to split, by index, each with its branch."""
    at = _places(launches)
    readers: dict[int, set[int]] = {}
    for index, launch in enumerate(launches):
        for number in launch.reads:
            readers.setdefault(number, set()).add(index)
    found = {}
    for index, launch in enumerate(launches):
        if not launch.movable or not _is_sum(launch):
            continue
        branch, needs = {index}, {BEGIN}
        waiting = list(launch.upper_reads)
        while waiting:
            number = waiting.pop()
            maker = at.get(number, BEGIN)
            if maker != BEGIN and _belongs(launches[maker], branch, readers, outputs):
                branch.add(maker)
                waiting += launches[maker].reads
            else:
                needs.add(maker)
        place = max(needs - branch)
        # Where the lower branch is over before the upper one could begin, nothing runs beside it.
        if launch.low is not None and at.get(launch.low, BEGIN) > place and wanted(launch):
            found[index] = _Branch(place, tuple(sorted(branch - {index})))
    return found


def _is_sum(launch: Launch) -> bool:
    """Whether a launch has two parts, with one value between them."""
    once = launch.low is not None and launch.reads.count(launch.low) == 1
    return once and len(launch.gives) == 1 and len(launch.reads) > 1


def _belongs(
    launch: Launch, branch: set[int], readers: dict[int, set[int]], outputs: Collection[int]
) -> bool:
    """Whether a launch is a part of the branch that reads it: nobody else does."""
    others = any(readers.get(number, set()) - branch for number in launch.gives)
    kept = any(number in outputs for number in launch.gives)
    return launch.movable and launch.low is None and not others and not kept


def _in_lanes(launches: Sequence[Launch], branches: dict[int, _Branch]) -> list[Turn]:
    """All turns in their order, without what they wait for.

    A branch comes as early as it can, since the network's own order may have it last.
    """
    moved = {member for branch in branches.values() for member in branch.members}
    turns: list[Turn] = []
    lanes: dict[int, int] = {}  # of the open branches

    def begin_behind(place: int) -> None:
        for index, branch in branches.items():
            if branch.place != place:
                continue
            taken = set(lanes.values())
            lane = lanes[index] = next(n for n in range(1, len(taken) + 2) if n not in taken)
            turns.extend(_whole(launches, member, lane) for member in branch.members)
            launch = launches[index]
            upper = (upper_value(launch.gives[0]),)
            turns.append(Turn(index, "upper", lane, upper, launch.upper_reads))

    begin_behind(BEGIN)
    for index, launch in enumerate(launches):
        if index in branches:
            assert launch.low is not None
            reads = (launch.low, upper_value(launch.gives[0]))
            turns.append(Turn(index, "join", 0, launch.gives, reads))
            del lanes[index]
        elif index not in moved:
            turns.append(_whole(launches, index, 0))
        begin_behind(index)
    return turns


def _whole(launches: Sequence[Launch], index: int, lane: int) -> Turn:
    return Turn(index, "whole", lane, launches[index].gives, launches[index].reads)


class _Order:
    """Which turns of each lane a lane is known to be behind: vector clocks."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, int]] = {0: {0: BEGIN}}
        self._then: dict[int, dict[int, int]] = {BEGIN: {0: BEGIN}}  # behind a turn

    def is_behind(self, lane: int, other: int, turn: int) -> bool:
        return self._known.get(lane, {}).get(other, BEGIN - 1) >= turn

    def wait(self, lane: int, turn: int) -> None:
        known = self._known.setdefault(lane, {})
        for other, place in self._then[turn].items():
            known[other] = max(known.get(other, BEGIN - 1), place)

    def go(self, lane: int, turn: int) -> None:
        known = self._known.setdefault(lane, {})
        known[lane] = turn
        self._then[turn] = dict(known)


def _with_waits(turns: Sequence[Turn]) -> list[Turn]:
    """With what each turn waits for, and nothing that it is behind anyhow."""
    order, maker, result = _Order(), _makers(turns), []
    for place, turn in enumerate(turns):
        waits = []
        # The latest first: it may be behind the others.
        for other in sorted({maker.get(number, BEGIN) for number in turn.reads}, reverse=True):
            lane = 0 if other == BEGIN else turns[other].lane
            if lane != turn.lane and not order.is_behind(turn.lane, lane, other):
                waits.append(other)
                order.wait(turn.lane, other)
        order.go(turn.lane, place)
        result.append(replace(turn, waits=tuple(waits)))
    return result


def _with_deaths(turns: Sequence[Turn], outputs: Collection[int]) -> tuple[Turn, ...]:
    """With the values that may be dropped behind each turn; the others stay until the end."""
    order, maker = _Order(), _makers(turns)
    users: dict[int, list[int]] = {}  # the turns that make or read a value
    for place, turn in enumerate(turns):
        for number in (*turn.gives, *turn.reads):
            users.setdefault(number, []).append(place)
    alive = {number for number in users if number not in outputs}
    result = []
    for place, turn in enumerate(turns):
        for other in turn.waits:
            order.wait(turn.lane, other)
        order.go(turn.lane, place)
        dead = []
        for number in sorted(alive):
            home = turns[maker[number]].lane if number in maker else 0
            if users[number][-1] <= place and all(
                order.is_behind(home, turns[user].lane, user) for user in users[number]
            ):
                dead.append(number)
        alive.difference_update(dead)
        result.append(replace(turn, dead=tuple(dead)))
    return tuple(result)


def critical_path(turns: Sequence[Turn], cost: Callable[[Turn], float]) -> float:
    """The cost of the turns that have to follow each other, by what they read, at most.

    Lanes are left out: what is measured is the work, not the order that was chosen for it.
    """
    maker = _makers(turns)
    until: list[float] = []
    for turn in turns:
        before = [until[maker[number]] for number in turn.reads if number in maker]
        until.append(max(before, default=0.0) + cost(turn))
    return max(until, default=0.0)


def lanes(turns: Iterable[Turn]) -> int:
    """The number of lanes, lane 0 among them."""
    return 1 + max((turn.lane for turn in turns), default=0)


def _places(launches: Sequence[Launch]) -> dict[int, int]:
    """Which launch gives a value, by its index."""
    return {number: index for index, launch in enumerate(launches) for number in launch.gives}


def _makers(turns: Sequence[Turn]) -> dict[int, int]:
    """Which turn gives a value, by its place."""
    return {number: place for place, turn in enumerate(turns) for number in turn.gives}
