"""A driver's file work, killed or out of disk at a chosen write, rename or flush: run by tests/storage/test_files.py.

python tests/failpoints.py FOLDER FIRST_SEED NUM_SEEDS

For each seed the same small run is made in a folder of its own by child processes, each ended at a place drawn from the
seed, until one comes through. What a child had been told is done must be there for the next one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from af2_ray.config import load_recipe
from af2_ray.data.quarantine import Failure
from af2_ray.runs.run import Run, finished, read_metrics
from af2_ray.storage import files
from af2_ray.storage.files import append_lines, check_digests, check_seal, read_json, sealed_json, write_whole
from af2_ray.storage.stores import replacing

STEPS = 6
RECIPE = load_recipe("tiny").model_copy(update={"corpus": None, "clap": None, "stages": []})
OPERATIONS = ("write", "replace", "rename", "fsync", "ftruncate")


def work(root: Path, tell: Callable[[str], None]) -> None:
    """What a driver does with its files, without Ray: `tell` is called with all that it counts as done."""
    run = Run.open(RECIPE, root)
    with run.lock():
        for name in ("first", "second"):
            folder = run.stage_dir(name)
            if finished(folder):
                continue
            if read_json(folder / "plan.json") is None:
                write_whole(folder / "plan.json", sealed_json({"plan": name}))
            quarantine = run.quarantine()
            last = max((row["step"] for row in read_metrics(folder)), default=0)
            for step in range(last + 1, STEPS + 1):
                quarantine.add([Failure(f"{name}-{step}.wav", "missing", row=step)], 100)
                tell(f"bad {name}-{step}.wav")
                append_lines(folder / "metrics.jsonl", [json.dumps({"step": step, "loss": step / 7})])
                tell(f"step {name} {step}")
            with replacing(folder / "model") as temporary:
                (temporary / "model.safetensors").write_bytes(os.urandom(100_000))
                (temporary / "config.json").write_text("{}")
            run.finish(folder, {"steps": STEPS})
            tell(f"done {name}")


def check(root: Path, told: list[str]) -> None:
    """Everything that counted as done is there, and nothing is half there."""
    saved = root / "recipe.yaml"
    if saved.exists():
        assert check_seal(str(saved), saved.read_bytes())
    elif told:
        raise AssertionError("the recipe is gone")
    bad = {row["uri"] for row in files.read_rows(root / "quarantine.jsonl")}
    assert {line[4:] for line in told if line.startswith("bad ")} <= bad, "a line of the quarantine is lost"
    for name in ("first", "second"):
        folder = root / "stages" / name
        steps = {row["step"] for row in read_metrics(folder)}
        assert {int(line.split()[2]) for line in told if line.startswith(f"step {name} ")} <= steps, "a step is lost"
        done = folder / "done.json"
        assert not done.exists() or check_seal(str(done), done.read_bytes())
        assert done.exists() or f"done {name}" not in told, "a finished step is not finished any more"
        if done.exists():
            assert (folder / "model" / files.DIGESTS).is_file()
            check_digests(folder / "model")


def fail_at(place: int, kind: str) -> None:
    """Let the file operation of that number kill this process, or find the disk full; a write is half done before."""
    count = 0

    def broken(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == place:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if name in ("write", "fsync", "replace", "rename"):
                    raise OSError(errno.ENOSPC, "no space left on device")
            return real(*args, **more)

        return call

    for name in OPERATIONS:
        setattr(os, name, broken(name, getattr(os, name)))


def child(root: Path, place: int, kind: str, pipe: int, say: Callable[..., int] = os.write) -> None:
    fail_at(place, kind)
    try:
        work(root, lambda line: say(pipe, f"{line}\n".encode()) and None)
    except OSError as error:
        os._exit(1 if error.errno == errno.ENOSPC else 3)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    os._exit(0)


def one(root: Path, seed: int) -> int:
    """Bring a run to its end through failures; how many there were."""
    draw = random.Random(seed)
    told: list[str] = []
    for number in range(1000):
        place = draw.randint(1, 30 if number < 20 else 10_000)
        kind = draw.choice(["kill", "full"])
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            child(root, place, kind, write_end)
        os.close(write_end)
        with os.fdopen(read_end) as file:
            told += file.read().splitlines()
        status = os.waitpid(pid, 0)[1]
        ended = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        assert ended in (0, 1, -signal.SIGKILL), f"seed {seed}, operation {place} ({kind}): exit code {ended}"
        try:
            check(root, told)
        except Exception as error:
            raise AssertionError(f"seed {seed}, failure {number}, operation {place} ({kind}): {error}") from error
        if ended == 0:
            left = [str(path) for path in root.rglob(".*") if path.name != ".lock"]
            assert left == [], f"seed {seed}: {left} is left"
            return number
    raise AssertionError(f"seed {seed} never comes to its end")


if __name__ == "__main__":
    logging.disable()
    base, first, num = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    failures = [one(base / str(seed), seed) for seed in range(first, first + num)]
    print(json.dumps({"seeds": num, "failures": sum(failures)}))
