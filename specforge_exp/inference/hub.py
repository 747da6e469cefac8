"""Asks the workers on behalf of all runs of a sweep, once for those that want the same.

What a run asks for is a pure function of its plan, so its forwards have numbers: number n of every
run of a *stream* names the same conversations. The hub owns what workers have computed for a
stream, from the oldest forward that one of its members has not taken up to the newest; it hands
the same object to all of them and lets go of it when the last one has taken it. A member that runs
ahead waits when the buffer is full, one that is behind never does. Whoever comes when the first
forwards are gone, keeps the others waiting without doing anything, or asks for something else all
the same, goes on in a stream of its own: what a run gets is always what it has asked for.

It lives in an actor, whose methods run one at a time up to their next `await`. Loads no torch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Who = tuple[str, str, int, int]
"""A trainer: its run, the name of its plan, how many trainers the run has, its process."""
Ids = list[bytes]
"""The tokens of each conversation of a forward, as int32."""
POLL = 20.0
"""Seconds that a call waits at most: who calls looks then whether anybody is there."""
INT32 = 4


@dataclass(eq=False)
class Forward:
    """Conversations whose states are asked for together."""

    ids: Ids
    answers: list[Any] | None = None
    """References; None: no worker has been asked yet."""

    @property
    def tokens(self) -> int:
        """Of all conversations."""
        return sum(map(len, self.ids)) // INT32


@dataclass(eq=False)
class Fanout:
    """A stream and its members."""

    members: dict[Who, "Member"] = field(default_factory=dict)
    forwards: dict[int, Forward] = field(default_factory=dict)
    """By number: those that somebody has asked for and not all have taken."""
    waiting: deque[int] = field(default_factory=deque)
    """Numbers of those that hold no part of the buffer yet."""
    held: int = 0
    """Bytes of the others."""
    gathering: bool = False
    """Nothing is let go of: runs are to come that want it from its beginning."""
    whole: bool = True
    """Nothing has been let go of."""

    @property
    def least(self) -> int:
        """How far the slowest is."""
        return 0 if self.gathering else min(member.taken for member in self.members.values())

    def wanted(self, number: int) -> bool:
        """Whether somebody has not taken a forward yet."""
        members = self.members.values()
        return self.gathering or any(m.next <= number or number in m.asked for m in members)


@dataclass(eq=False)
class Member:
    """A trainer."""

    stream: Fanout
    next: int = 0
    """The number of what it asks for next."""
    asked: set[int] = field(default_factory=set)
    """Numbers of what it has not taken."""
    taken: int = 0
    """Forwards that it has: all members of a stream take them in the same order."""
    waits: int | None = None
    """The number that it waits for, and no worker has been asked for."""
    since: float = 0.0
    """When it began to."""
    active: float = 0.0
    """When it was last heard of."""
    note: str = ""
    """What it is to be told."""


class Hub:
    """The streams of a fleet.

    Args:
        workers: the fleet's.
        buffer: bytes that may be held, over all streams; one forward of each comes on top.
        token_bytes: of one token's states.
        places: runs that the sweep has at a time.
        patience: seconds that runs wait for one that does nothing.
    """

    def __init__(
        self, workers: list[Any], buffer: int, token_bytes: int, places: int, patience: float
    ) -> None:
        self.workers, self.buffer, self.token_bytes = workers, buffer, token_bytes
        self.places, self.patience = places, patience
        self.members: dict[Who, Member] = {}
        self.early: dict[Who, dict[int, Ids]] = {}
        """What each asks for after something that has not arrived yet."""
        self.streams: list[Fanout] = []
        self.plans: dict[str, set[str]] = {}
        """Of each run that has come: the plans of its trainers."""
        self.there: set[str] = set()
        """Runs of which all trainers have come."""
        self.coming: set[str] | None = None
        """Runs that have not ended; None: not known yet."""
        self.load = [0] * len(workers)
        """Tokens that each has been asked about."""
        self.computed = self.used = 0
        self.answers: dict[tuple[Any, ...], Any] = {}
        self.changed = asyncio.Event()

    async def once(self, method: str, *args: Any) -> list[Any]:
        """The reference of what the first worker answers; it is asked once for all runs."""
        key = (method, *args)
        if key not in self.answers:
            self.answers[key] = getattr(self.workers[0], method).remote(*args)
        return [self.answers[key]]

    async def ask(self, who: Who, number: int, ids: Ids) -> None:
        """A trainer is going to want a forward; its numbers count up from 0, but calls of an actor
        that awaits may overtake each other."""
        early = self.early.setdefault(who, {})
        early[number] = ids
        while (following := self.following(who)) in early:
            self.plan(who, following, early.pop(following))
        self.go_on()
        self.tell()

    def following(self, who: Who) -> int:
        """The number of what a trainer asks for next."""
        return self.members[who].next if who in self.members else 0

    def plan(self, who: Who, number: int, ids: Ids) -> None:
        """Note what a trainer asks for."""
        member = self.members.get(who) or self.join(who, ids)
        member.active = time.monotonic()
        known = member.stream.forwards.get(number)
        if known and known.ids != ids:
            self.part(who, "it asks for other states than the runs it shared with")
        if number not in member.stream.forwards:
            member.stream.forwards[number] = Forward(ids)
            member.stream.waiting.append(number)
        member.asked.add(number)
        member.next = number + 1

    async def take(self, who: Who, number: int) -> tuple[list[Any], str] | None:
        """References of a forward's states, and what the trainer is to be told; None: not yet.

        Raises:
            TimeoutError: it was not asked for.
        """
        began = time.monotonic()
        while self.following(who) <= number:
            await asyncio.wait_for(self.changed.wait(), began + POLL - time.monotonic())
        member = self.members[who]
        if member.waits != number:
            member.waits, member.since = number, began
        self.go_on()
        while (forward := member.stream.forwards[number]).answers is None:
            left = began + POLL - time.monotonic()
            if left <= 0:
                return None
            try:
                await asyncio.wait_for(self.changed.wait(), left)
            except TimeoutError:
                return None
        member.waits, member.active = None, time.monotonic()
        self.used += len(forward.ids)
        note, member.note = member.note, ""
        return forward.answers, note

    async def took(self, who: Who, number: int) -> None:
        """A trainer has the states of a forward in memory of its own."""
        member = self.members[who]
        member.active = time.monotonic()
        member.asked.discard(number)
        member.taken += 1
        self.let_go(member.stream, [number])
        self.go_on()

    async def direct(self, conversations: int) -> None:
        """A trainer has asked a worker itself, as states were lost."""
        self.computed += conversations

    async def look(self, coming: Collection[str], dead: Collection[Who]) -> list[Who]:
        """What the sweep's process sees: the runs that have not ended, trainers that are no more.
        Returns the trainers that are here."""
        self.coming = {*coming}
        for who in dead:
            if who in self.members:
                self.leave(who)
                del self.members[who], self.early[who]
        if not self.coming - self.there:
            self.answers.clear()
        self.lose_patience()
        self.gather()
        self.go_on()
        return list(self.members)

    async def summary(self) -> tuple[int, int, int]:
        """Runs, conversations that the target was run on, and those whose states runs took."""
        return len(self.plans), self.computed, self.used

    def join(self, who: Who, ids: Ids) -> Member:
        """Find the stream that begins with this forward, or begin one."""
        run, plan, trainers, _ = who
        plans = self.plans.setdefault(run, set())
        again = plan in plans
        plans.add(plan)
        if len(plans) == trainers:
            self.there.add(run)
        for stream in self.streams:
            alike = next(iter(stream.members))[1] == plan
            if alike and stream.whole and 0 in stream.forwards and stream.forwards[0].ids == ids:
                break
        else:
            stream = Fanout(gathering=True)
            self.streams.append(stream)
        stream.members[who] = self.members[who] = member = Member(stream)
        if again:  # it has been here before: nobody is to come
            self.begin(stream)
        self.gather()
        return member

    def gather(self) -> None:
        """Let streams go on when nobody can come to them any more: every run has come, or those
        that have take all the places."""
        streams = [stream for stream in self.streams if stream.gathering]
        if not streams or self.coming is None:
            return
        runs = {who[0] for stream in streams for who in stream.members} & self.there
        if not self.coming - self.there or len(runs) >= self.places:
            for stream in streams:
                self.begin(stream)

    def begin(self, stream: Fanout, why: str = "") -> None:
        """Wait for nobody to come to a stream any more."""
        stream.gathering = False
        others = len(stream.members) - 1
        what = f"shares its states with {others} other runs" if others else "has its states alone"
        for member in stream.members.values():
            member.note = what + why
        self.let_go(stream, list(stream.forwards))

    def lose_patience(self) -> None:
        """Leave behind who keeps others waiting and does nothing."""
        late, said = time.monotonic() - self.patience, f"for {self.patience:.0f} s"
        for stream in list(self.streams):
            if all(m.waits is None or m.since > late for m in stream.members.values()):
                continue
            if stream.gathering:
                absent = len((self.coming or set()) - self.there)
                self.begin(stream, f": {absent} that are to come have been waited for {said}")
                continue
            for who, member in list(stream.members.items()):
                slowest = member.taken == stream.least
                if slowest and member.waits is None and member.active < late:
                    self.part(who, f"it did nothing {said} and others waited")

    def part(self, who: Who, why: str) -> None:
        """Give a trainer a stream of its own, with what it has asked for and not taken."""
        member = self.members[who]
        numbers = sorted(member.asked)  # anew: what is there is not to be kept for it
        own = {n: Forward(member.stream.forwards[n].ids) for n in numbers}
        self.leave(who)
        member.stream = Fanout({who: member}, own, deque(numbers), whole=False)
        member.note = f"has its states alone: {why}"
        self.streams.append(member.stream)

    def leave(self, who: Who) -> None:
        """Take a trainer out of its stream; nothing is kept for it."""
        stream = self.members[who].stream
        del stream.members[who]
        if not stream.members:
            self.streams.remove(stream)
            return
        for number in list(stream.waiting):
            if not any(number in member.asked for member in stream.members.values()):
                stream.waiting.remove(number)
                del stream.forwards[number]
        self.let_go(stream, list(stream.forwards))

    def let_go(self, stream: Fanout, numbers: list[int]) -> None:
        """Forget those of these forwards that every member has taken."""
        for number in numbers:
            if not stream.wanted(number):
                forward = stream.forwards.pop(number)
                if number in stream.waiting:  # it was taken in the stream that its taker has left
                    stream.waiting.remove(number)
                else:
                    stream.held -= forward.tokens * self.token_bytes
                stream.whole = False

    def go_on(self) -> None:
        """Ask workers for what there is room for, and for what a slowest member waits for."""
        before = self.computed
        for stream in self.streams:
            while stream.waiting and self.has_room(stream, stream.forwards[stream.waiting[0]]):
                self.hold(stream, stream.waiting[0])
            least = stream.least
            for member in stream.members.values():
                number = member.waits
                if number is not None and member.taken == least and number in stream.waiting:
                    self.hold(stream, number)
        if self.computed > before:
            self.tell()

    def tell(self) -> None:
        """Let calls that wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def has_room(self, stream: Fanout, forward: Forward) -> bool:
        """Whether a stream may hold it too: each has its part of the buffer."""
        size = forward.tokens * self.token_bytes
        held = sum(other.held for other in self.streams)
        part = self.buffer // len(self.streams)
        return stream.held + size <= part and held + size <= self.buffer

    def hold(self, stream: Fanout, number: int) -> None:
        """Ask a worker, each for as many tokens."""
        forward = stream.forwards[number]
        stream.waiting.remove(number)
        stream.held += forward.tokens * self.token_bytes
        worker = min(range(len(self.load)), key=lambda i: (self.load[i], i))
        self.load[worker] += forward.tokens
        self.computed += len(forward.ids)
        ids = [np.frombuffer(one, np.int32) for one in forward.ids]
        method = self.workers[worker].states.options(num_returns=len(ids) + 1)
        forward.answers = method.remote(ids, "")  # Ray keeps them, not a store
