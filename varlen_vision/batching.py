"""Filling batches up to a budget, without holding much more than two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], cost: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Put items together so that each batch costs at most `budget`; one that costs more is alone.

    Items are taken one by one until those waiting cost two budgets; the largest of them that fit together
    make a batch. So little of a batch stays empty, and no more is held than two budgets and one item.

    Args:
        items: taken only when needed.
        cost: of an item, at least 1.
        budget: at least 1.
    """
    waiting: list[T] = []
    total = 0
    for item in items:
        price = cost(item)
        if price >= budget:
            yield [item]
            continue
        waiting.append(item)
        total += price
        if total >= 2 * budget:
            batch, waiting = _fill(waiting, cost, budget)
            total -= sum(map(cost, batch))
            yield batch
    while waiting:
        batch, waiting = _fill(waiting, cost, budget)
        yield batch


def _fill(waiting: list[T], cost: Callable[[T], int], budget: int) -> tuple[list[T], list[T]]:
    """Largest first, all that fit; and the others."""
    batch, others = [], []
    room = budget
    for item in sorted(waiting, key=cost, reverse=True):
        if (price := cost(item)) <= room:
            batch.append(item)
            room -= price
        else:
            others.append(item)
    return batch, others
