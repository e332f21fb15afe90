"""The share of one process: chunks claimed one by one, the most expensive first, then those that stall."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from varlen_vision.jobs.cost import CostModel
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Journals
from varlen_vision.jobs.leases import Claim, Leases
from varlen_vision.jobs.plan import Chunk
from varlen_vision.jobs.prepared import Load

# A chunk that takes so many times longer than here is taken over by who has nothing else to do.
LAGGING = 3.0
# Of what nobody has claimed a process may hold its share of this part: who comes first leaves something for
# the others, and all end together.
HOLD = 0.5
# Batches that it may hold in any case: two wait to be packed, and workers prepare the next.
LEAST = 4
# Seconds that are given in any case: for start-up, and batches that wait for others.
PATIENCE = 5.0


class Work:
    """Which items are this process's to do."""

    def __init__(
        self,
        items: Sequence[Item],
        chunks: Sequence[Chunk],
        leases: Leases,
        journals: Journals,
        costs: CostModel,
        batch: Load,
    ) -> None:
        """With `batch`, what a full batch asks of the model, before there was one."""
        self._items = items
        self._chunks = {chunk.name: chunk for chunk in chunks}
        self._leases = leases
        self._journals = journals
        self._costs = costs
        self._batch = batch
        self._unread = 0  # items of the last chunk that was claimed
        self._limit = math.inf  # what may be in hand before another is claimed
        self._open: dict[str, set[int]] = {}  # chunks held here, and their items that have no line yet
        self._chunk_of: dict[int, str] = {}
        self._held: dict[str, int] = {}  # all chunks that were ever held here, with the claim's generation
        self.taken_over = 0
        """Chunks that were another's."""

    def coming(self, stop: Callable[[], bool]) -> Iterator[Item]:
        """Items of chunk after chunk, claimed when it is their turn; ends where none can be had now."""
        while not stop():
            chunk = self._claim()
            if chunk is None:
                return
            self._journals.refresh()
            missing = [i for i in chunk.items if self._items[i].id not in self._journals.errors]
            self._open[chunk.name] = set(missing)
            self._chunk_of |= dict.fromkeys(missing, chunk.name)
            self._close(chunk.name)
            self._unread = len(missing)
            for index in sorted(missing):
                self._unread -= 1
                yield self._items[index]

    def more(self) -> bool:
        """Whether to take another item ahead, by what this process holds of all that is left."""
        return self._unread > 0 or self._in_hand() < self._limit

    def still_mine(self, items: Iterable[Item]) -> set[int]:
        """Indices of those that nobody has taken over."""
        claims = self._leases.claims()
        holders = {name: claim.worker for name, claim in claims.items()}
        mine = {name for name in self._open if holders.get(name) == self._leases.worker}
        for name in set(self._open) - mine:
            self._drop(name)
        return {item.index for item in items if self._chunk_of.get(item.index) in mine}

    def undisputed(self) -> bool:
        """Whether no chunk of this process was ever another's too.

        If so no line of its journal so far is, or will be, in another's: who takes a chunk over reads the
        journals first.
        """
        # First, and a copy: this is asked while results are written, and a chunk may be claimed meanwhile.
        held = list(self._held.items())
        claims = self._leases.claims()
        # Where a claim is gone, somebody has removed the run.
        return not any(
            generation or (last := claims.get(name)) is None or last.generation for name, generation in held
        )

    def done(self, items: Iterable[Item]) -> None:
        """These have their lines."""
        for item in items:
            name = self._chunk_of.pop(item.index, None)
            if name in self._open:
                self._open[name].discard(item.index)
                self._close(name)

    def all_done(self) -> bool:
        """Whether nothing is left for anyone."""
        return self._chunks.keys() <= self._leases.done()

    def _close(self, name: str) -> None:
        if not self._open[name]:
            self._leases.finish(name)
            del self._open[name]

    def _drop(self, name: str) -> None:
        for index in self._open.pop(name):
            self._chunk_of.pop(index, None)

    def _claim(self) -> Chunk | None:
        done, claims = self._leases.done(), self._leases.claims()
        left = [chunk for name, chunk in self._chunks.items() if name not in done]
        left.sort(key=lambda chunk: -self._costs.predict(chunk.load))
        last_of = {claim.worker: claim for claim in claims.values()}
        held = {worker for worker, claim in last_of.items() if self._leases.held(claim)}
        free = [
            chunk for chunk in left if (last := claims.get(chunk.name)) is None or last.worker not in held
        ]
        company = self._leases.company()
        share = HOLD * sum(self._costs.predict(chunk.load) for chunk in free) / company
        batch = self._costs.predict(self._costs.last or self._batch)
        self._limit = max(LEAST * batch, share) if company > 1 else math.inf
        for chunk in free or self._lagging(left, claims):
            last = claims.get(chunk.name)
            if self._leases.claim(chunk.name, last):
                self.taken_over += last is not None
                self._held[chunk.name] = 0 if last is None else last.generation + 1
                return chunk
        return None

    def _in_hand(self) -> float:
        """What the items of this process that have no line yet are expected to cost."""
        held = ((self._chunks[name], len(left)) for name, left in self._open.items())
        return sum(self._costs.predict(chunk.load) * left / len(chunk.items) for chunk, left in held)

    def _lagging(self, left: Collection[Chunk], claims: dict[str, Claim]) -> list[Chunk]:
        """Chunks of others that take much longer than all that their holder has in hand would take here.

        Each time that a chunk changes hands the patience doubles: two slow processes do not take it from one
        another forever.
        """
        if not self._costs.measured:
            return []
        in_hand: dict[str, float] = {}
        for chunk in left:
            worker = claims[chunk.name].worker
            in_hand[worker] = in_hand.get(worker, 0.0) + self._costs.predict(chunk.load)
        return [
            chunk
            for chunk in left
            if (claim := claims[chunk.name]).worker != self._leases.worker
            and claim.age > (PATIENCE + LAGGING * in_hand[claim.worker]) * 2**claim.generation
        ]
