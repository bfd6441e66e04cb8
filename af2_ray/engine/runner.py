"""An engine in a thread of its own: requests may come from any thread, and the engine sleeps when there are none."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Request
from af2_ray.engine.ticket import Emit, Ticket

logger = logging.getLogger(__name__)

_Forgetting = tuple[Sequence[str], "Future[int]"]
_LONGEST_SLEEP_S = 3600.0  # however long audio is kept: a condition cannot wait for longer than its clock goes


class Call:
    """A request that was handed over; `cancel` ends it wherever it is."""

    def __init__(self, request: Request, emit: Emit) -> None:
        self.request, self.emit = request, emit
        self.ticket: Ticket | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Give the request up, from any thread."""
        self._cancelled = True
        if self.ticket is not None:
            self.ticket.cancel()

    def submit_to(self, engine: Engine) -> None:
        """Hand the request to the engine, in the engine's thread."""
        self.ticket = engine.submit(self.request, self.emit)
        if self._cancelled:
            self.ticket.cancel()


class Runner:
    """Steps an engine until closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[Call] = deque()
        self._forgetting: deque[_Forgetting] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._windows = 0  # of the engine's requests, after its last step
        self._step_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, emit: Emit) -> Call:
        """Hand a request over; `emit` is called in the engine's thread, so it must be quick."""
        call = Call(request, emit)
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed: it takes no more requests")
            self._inbox.append(call)
            self._wake.notify()
        return call

    def forget(self, keys: Sequence[str]) -> Future[int]:
        """Forget recordings between two steps (`Engine.forget`); how many clips were kept of them."""
        number = Future[int]()
        with self._wake:
            if self._closed:
                number.set_result(0)
            else:
                self._forgetting.append((keys, number))
                self._wake.notify()
        return number

    def fault(self) -> str:
        """What is wrong with the engine or its thread; empty: it is well."""
        stalled_s = self.stalled_s()
        if stalled_s == float("inf"):
            return "the engine's thread has ended"
        if stalled_s > self.engine.settings.stall_s:
            return f"the engine has been in one step for {stalled_s:.0f} s"
        return self.engine.health.fault

    def stalled_s(self) -> float:
        """How long the step at hand has been going on; 0 between steps, infinite when the thread is gone."""
        if not self._thread.is_alive() and not self._closed:
            return float("inf")
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def num_windows(self) -> int:
        """Audio windows of all requests without an answer."""
        with self._wake:
            return self._windows + sum(clip.num_windows for call in self._inbox for clip in call.request.clips)

    def close(self) -> None:
        """Take no more requests, fail those that are there, end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        busy = False
        while True:
            with self._wake:
                if not (busy or self._inbox or self._forgetting or self._closed):
                    self._wake.wait(self._sleep_s())
                calls, forgetting = list(self._inbox), list(self._forgetting)
                self._inbox.clear()
                self._forgetting.clear()
                if self._closed:
                    break
            busy = self._step(calls, forgetting) if busy or calls else self._forget(forgetting)
        for _, number in forgetting:
            _settle(number, 0)
        for call in calls:
            call.submit_to(self.engine)
        self.engine.close()

    def _sleep_s(self) -> float:
        """How long there is nothing to do if nobody comes: until the next clip is too old to be kept."""
        old_s = self.engine.memory.next_old_s()
        return _LONGEST_SLEEP_S if old_s is None else min(old_s, _LONGEST_SLEEP_S)

    def _forget(self, forgetting: Sequence[_Forgetting]) -> bool:
        for keys, number in forgetting:
            _settle(number, self.engine.forget(keys))
        self.engine.memory.forget_old()
        return False

    def _step(self, calls: list[Call], forgetting: Sequence[_Forgetting]) -> bool:
        self._step_since = time.monotonic()
        try:
            try:
                for call in calls:
                    call.submit_to(self.engine)
            finally:
                self._forget(forgetting)  # those that were handed over before are among them
            return self.engine.step()
        except Exception as error:  # a fault of the engine itself: its requests fail, and it goes on
            logger.exception("the engine failed")
            self.engine.health.note_failure("the engine", error)
            self.engine.fail_all()
            self.engine.end_step()
            return False
        finally:
            self._windows = self.engine.num_windows
            self._step_since = None


def _settle(number: Future[int], value: int) -> None:
    """Give a number to who waits for it, if they still do."""
    if number.set_running_or_notify_cancel():
        number.set_result(value)
