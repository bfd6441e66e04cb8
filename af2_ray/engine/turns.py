"""Whose turn it is: requests of several owners in an order that no owner can fill alone.

Whoever asks for much waits for what they asked for, not the others: the next is always a request of the owner who
holds least. An owner is an API key; without keys all requests have one owner, and come in the order of their arrival.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from af2_ray.engine.ticket import Ticket


def owners_of(tickets: Iterable[Ticket]) -> Counter[str]:
    """Number of requests of each owner."""
    return Counter(ticket.request.owner for ticket in tickets)


def in_turn(tickets: Iterable[Ticket], held: Counter[str]) -> Iterator[Ticket]:
    """Requests by turns: the next is of the owner who holds least; of two, of the one who has waited longest.

    Args:
        held: number of requests that each owner has got further already; the caller counts those that it takes.
    """
    lines: dict[str, deque[Ticket]] = {}
    for ticket in sorted(tickets, key=lambda ticket: ticket.since):  # sorted almost always: one pass over them
        lines.setdefault(ticket.request.owner, deque()).append(ticket)
    while lines:
        owner = min(lines, key=lambda owner: (held[owner], lines[owner][0].since))
        yield lines[owner].popleft()
        if not lines[owner]:
            del lines[owner]
