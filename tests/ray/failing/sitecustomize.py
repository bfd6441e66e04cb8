"""Python imports this at its start where the folder is on PYTHONPATH: a file operation of the package that fails.

AF2_FAIL_AT names the operation, counted in each process by itself: `17 kill` ends the job (its driver and this process)
by SIGKILL, `17 full` finds the disk full. It happens once in a job: AF2_FAIL_ONCE names the file that says so.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

_OPERATIONS = ("write", "replace", "rename", "fsync")


class _Failing:
    """The module `os`, one of whose calls does not come back."""

    def __init__(self, place: int, kind: str) -> None:
        self._place, self._kind, self._count = place, kind, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in _OPERATIONS:
            return real

        def call(*args: Any, **more: Any) -> Any:
            self._count += 1
            if self._count >= self._place and self._first():
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                if self._kind == "kill":
                    os.kill(int(os.environ["AF2_FAIL_DRIVER"]), signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, "no space left on device")
            return real(*args, **more)

        return call

    def _first(self) -> bool:
        try:
            os.close(os.open(os.environ["AF2_FAIL_ONCE"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


if os.environ.get("AF2_FAIL_AT"):
    os.environ.setdefault("AF2_FAIL_DRIVER", str(os.getpid()))  # the first process of the job; Ray's have it from there
    _place, _kind = os.environ["AF2_FAIL_AT"].split()
    from af2_ray.storage import files

    files.os = _Failing(int(_place), _kind)  # type: ignore[assignment]
