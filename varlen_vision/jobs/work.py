"""The share of one process: chunks claimed one by one, the most expensive first, then those that stall."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from varlen_vision.jobs.cost import CostModel
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Journals
from varlen_vision.jobs.leases import Claim, Leases
from varlen_vision.jobs.plan import Chunk

# A chunk that takes so many times longer than here is taken over by who has nothing else to do.
LAGGING = 3.0
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
    ) -> None:
        self._items = items
        self._chunks = {chunk.name: chunk for chunk in chunks}
        self._leases = leases
        self._journals = journals
        self._costs = costs
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
            yield from (self._items[index] for index in sorted(missing))

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
        claims = self._leases.claims()
        # Where a claim is gone, somebody has removed the run.
        return not any(
            generation or (last := claims.get(name)) is None or last.generation
            for name, generation in self._held.items()
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
        for chunk in free or self._lagging(left, claims):
            last = claims.get(chunk.name)
            if self._leases.claim(chunk.name, last):
                self.taken_over += last is not None
                self._held[chunk.name] = 0 if last is None else last.generation + 1
                return chunk
        return None

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
