"""The way of requests to their audio: they wait for memory, are admitted, and have encoded what is not kept.

Owners take turns (`turns`): whoever asks for much waits for it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from af2_ray.engine.audio_memory import AudioMemory, is_of
from af2_ray.engine.encoder import Encoder
from af2_ray.engine.request import RequestFailure
from af2_ray.engine.ticket import Ticket
from af2_ray.engine.turns import in_turn, owners_of


class Admission:
    """Requests that are not being written yet.

    Args:
        max_passes: number of requests with audio that may go ahead of one that memory has no room for.

    Attributes:
        waiting: requests that memory has no room for, in no order.
        admitted: requests whose clips are held, encoded or on their way, in the order of their admission.
    """

    def __init__(self, memory: AudioMemory, encoder: Encoder, max_passes: int) -> None:
        self._memory, self._encoder, self._max_passes = memory, encoder, max_passes
        self.waiting: list[Ticket] = []
        self.admitted: list[Ticket] = []

    def admit(self, running: Sequence[Ticket]) -> dict[Ticket, RequestFailure]:
        """Admit what memory has room for, beside answers that are running; what is refused, and why."""
        refused: dict[Ticket, RequestFailure] = {}
        if not self.waiting:
            return refused
        held = owners_of((*self.admitted, *running))
        held_up: Ticket | None = None  # whose turn it is, though there is no room
        for ticket in in_turn(self.waiting, held):
            if held_up is not None:
                if not self._may_pass(ticket, held_up):
                    continue
            elif not self._memory.has_room(ticket.clips) and not self._make_way(ticket, held):
                held_up = ticket
                continue
            self.waiting.remove(ticket)
            if unknown := self._take_in(ticket):
                refused[ticket] = RequestFailure("recordings are not kept here: send them again", False, unknown)
            else:
                held[ticket.request.owner] += 1
        return refused

    def ready(self) -> list[Ticket]:
        """Admitted requests whose clips are there."""
        return [ticket for ticket in self.admitted if all(key in self._memory for key in ticket.clips)]

    def let_go(self, ticket: Ticket) -> None:
        """Take back what admission gave a request; what only it waited for is not encoded."""
        self.admitted.remove(ticket)
        wanted = {key for other in self.admitted for key in other.clips}
        for key in ticket.clips:
            if key not in wanted:
                self._encoder.drop(key)
        self._memory.unpin(ticket.clips)

    def forget(self, keys: Sequence[str]) -> int:
        """Forget recordings, those that are held or waited for when their last answer ends; how many clips are kept."""
        for ticket in self.waiting:
            ticket.forgotten.update(key for key in ticket.clips if is_of(key, keys))
        return self._memory.forget(keys)

    def _may_pass(self, ticket: Ticket, held_up: Ticket) -> bool:
        """Whether a request may go ahead of one that memory has no room for.

        Without audio always, for it takes no memory. With audio that is kept or held already it takes no more, but it
        keeps what is held from being let go; so only `max_passes` do, and then memory empties until the one that was
        held up has its room.
        """
        if not ticket.clips:
            return True
        if held_up.num_passed >= self._max_passes or not self._memory.knows(ticket.clips):
            return False
        if not self._memory.has_room(ticket.clips):
            return False
        held_up.num_passed += 1
        return True

    def _make_way(self, ticket: Ticket, held: Counter[str]) -> bool:
        """Have owners who hold more give back the memory of answers not begun, the last first; is there room now?

        Those wait again, in their old place; what is encoded of their audio stays while it can. They hold more by two
        at least, so that no two owners take from each other to and fro.
        """
        for other in reversed(self.admitted[:]):
            owner = other.request.owner
            if other.clips and held[owner] > held[ticket.request.owner] + 1:
                other.forgotten.update(self._memory.forgotten_of(other.clips))
                self.let_go(other)
                self.waiting.append(other)
                held[owner] -= 1
                if self._memory.has_room(ticket.clips):
                    return True
        return False

    def _take_in(self, ticket: Ticket) -> tuple[str, ...]:
        """Hold a request's clips and have them encoded; keys of clips that are neither kept nor here: it cannot be."""
        coming = {clip.key: clip for clip in ticket.request.clips if clip.key not in self._memory}
        unknown = [key for key, clip in coming.items() if clip.windows is None and key not in self._encoder]
        if unknown:
            return tuple(unknown)
        self._memory.pin(ticket.clips)
        self._memory.forget(ticket.forgotten)
        self._memory.hits += len(ticket.clips) - len(coming)
        self._memory.misses += len(coming)
        ticket.encoded_windows = sum(clip.num_windows for clip in coming.values())
        for key, clip in coming.items():
            if clip.windows is not None:
                self._encoder.add(key, clip.windows, ticket.request.owner)
        self.admitted.append(ticket)
        return ()
