"""Runs a job of `jobs/` in this process, as its command would."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from af2_ray import console

JOBS = Path(__file__).parents[1] / "jobs"


def run_job(name: str, *arguments: Any) -> int:
    """The exit code; what the job prints goes where pytest captures it."""
    job = runpy.run_path(str(JOBS / f"{name}.py"))["main"]
    files = console.console.file, console.errors.file
    console.console.file, console.errors.file = sys.stdout, sys.stderr
    codes: list[int | None] = []
    try:
        console.main(lambda: codes.append(job([str(argument) for argument in arguments])))
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        console.console.file, console.errors.file = files
    return codes[0] or 0
