"""The server under a load that rises and falls: replicas, requests lost, memory, and whether its metrics add up.

A random model (that of `benchmarks/serve.py --quick`) on Ray Serve with one to two replicas. Clients ask one question
after another over HTTP, each about noise of its own of 2 to 20 s, answers of 16 tokens: one client, then many, then
one. Every second the replicas, the audio windows being asked about and the memory of all of Ray's processes are noted.
With --soak MINUTES the load is steady instead. `load.png` (in --out) plots it.

- `replicas_most`, `replicas_end`: of the model; `scaled` is whether they went 1, 2, 1.
- `requests`, `failed`: answers asked for, and those that were not given.
- `counted`: requests that the server's own metrics count at the end.
- `memory_growth_mib`: mean of the last quarter less that of the second one; the first warms up.
- `stuck`: answers and waiting requests left in the engines at the end.

The last line is one JSON object.

    python benchmarks/load.py [--quick] [--soak MINUTES] [--out DIR]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import soundfile as sf

TOKENS = 16
CLIP_S = (2.0, 20.0)
PHASES = ((1, 30.0), (12, 90.0), (1, 60.0))  # clients, seconds
QUICK = ((1, 6.0), (8, 16.0), (1, 14.0))
METRICS_WAIT_S = 30.0  # Ray's processes report every ten seconds
OVERRIDES = (
    *("serve.max_replicas=2", "serve.cpus_per_replica=1", "serve.target_windows=8", "serve.upscale_delay_s=2"),
    *("serve.target_ongoing_requests=4", "serve.downscale_delay_s=5", "serve.audio_memory_mb=64"),
)


class Load:
    """Clients that come and go, and what they have seen."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.wanted = 0
        self.asked = self.failed = self.windows = 0
        self.over = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def set(self, clients: int) -> None:
        """So many clients from now on; those too many end after the answer they wait for."""
        self.wanted = clients
        while len(self._threads) < clients:
            thread = threading.Thread(target=self._client, args=(len(self._threads),))
            self._threads.append(thread)
            thread.start()

    def end(self) -> None:
        """Wait for the last answers."""
        self.over = True
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        rng = np.random.default_rng(number)
        while not self.over:
            if number >= self.wanted:
                time.sleep(0.1)
                continue
            seconds = float(rng.uniform(*CLIP_S))
            windows = int(np.ceil(seconds / 10))
            with self._lock:
                self.asked += 1
                self.windows += windows
            ok = self._ask(seconds, rng)
            with self._lock:
                self.failed += not ok
                self.windows -= windows

    def _ask(self, seconds: float, rng: np.random.Generator) -> bool:
        file = io.BytesIO()
        sf.write(file, 0.2 * rng.standard_normal(round(seconds * 16_000)), 16_000, format="FLAC")
        audio = {"data": base64.b64encode(file.getvalue()).decode(), "format": "flac"}
        content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "which sound is heard?"}]
        body = {"model": "af2-tiny", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=180) as response:
                return "choices" in json.load(response)
        except OSError as error:
            print(f"a request failed: {error}", flush=True)
            return False


def look(load: Load, since: float) -> dict[str, float]:
    """Replicas, windows, clients and memory at the moment."""
    from ray import serve

    states = serve.status().applications["af2"].deployments["Model"].replica_states
    replicas = sum(count for state, count in states.items() if str(getattr(state, "value", state)) == "RUNNING")
    memory = 0
    for process in psutil.Process().children(recursive=True):
        try:
            memory += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended meanwhile
    counts = {"replicas": replicas, "windows": load.windows, "clients": load.wanted, "memory_mib": memory / 2**20}
    return {"t": time.monotonic() - since, **counts}


def counted(url: str, name: str) -> float:
    """The sum of a metric over all replicas, as the server tells it."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(rf"^ray_{name}(?:_total)?\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def measure(phases: tuple[tuple[int, float], ...]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Run the phases; what was seen each second, and the measures."""
    import ray
    from serve import build  # benchmarks/serve.py

    from serve_apps.af2 import run_app

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build(quick=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with run_app(folder, "tiny", overrides=OVERRIDES) as url:
            load, since = Load(url), time.monotonic()
            try:
                for clients, seconds in phases:
                    load.set(clients)
                    until = time.monotonic() + seconds
                    while time.monotonic() < until:
                        seen.append(look(load, since))
                        time.sleep(1)
                    print(f"{seen[-1]['t']:6.0f} s: {clients} clients, {seen[-1]['replicas']:.0f} replicas", flush=True)
            finally:
                load.end()
            took_s = time.monotonic() - since
            deadline = time.monotonic() + METRICS_WAIT_S
            while (total := counted(url, "af2_requests")) < load.asked - load.failed and time.monotonic() < deadline:
                time.sleep(1)
            stuck = counted(url, "af2_running") + counted(url, "af2_waiting")
    ray.shutdown()
    replicas = [row["replicas"] for row in seen]
    memory = np.array([row["memory_mib"] for row in seen])
    quarter = len(memory) // 4
    return seen, {
        "replicas_most": max(replicas),
        "replicas_end": replicas[-1],
        "scaled": replicas[-1] == 1 and max(replicas) == 2,
        "requests": load.asked,
        "failed": load.failed,
        "counted": total,
        "stuck": stuck,
        "answers_per_s": round((load.asked - load.failed) / took_s, 2),
        "memory_growth_mib": round(float(memory[-quarter:].mean() - memory[quarter : 2 * quarter].mean()), 1),
        "memory_mib": round(float(memory[-quarter:].mean()), 1),
    }


def plot(seen: list[dict[str, float]], path: Path) -> None:
    """Windows and clients, replicas, memory, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    t = [row["t"] for row in seen]
    above, middle, below = figure.subplots(3, 1, sharex=True)
    above.fill_between(t, [row["windows"] for row in seen], step="post", color="#1f6f78", alpha=0.35)
    above.step(t, [row["clients"] for row in seen], where="post", color="#c8553d", linewidth=1.2)
    above.set_title("10 s windows asked about (area), clients (line)", loc="left", fontsize=10)
    middle.step(t, [row["replicas"] for row in seen], where="post", color="#1f6f78")
    middle.set_title("replicas of the model", loc="left", fontsize=10)
    middle.set_yticks([0, 1, 2])
    below.plot(t, [row["memory_mib"] / 1024 for row in seen], color="#1f6f78")
    below.set_title("GiB of all processes", loc="left", fontsize=10)
    below.set_xlabel("seconds")
    for axes in (above, middle, below):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 s of load instead of three minutes")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="four clients for so long")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the plot (%(default)s)")
    args = parser.parse_args()
    phases = ((4, 60 * args.soak),) if args.soak else QUICK if args.quick else PHASES
    seen, result = measure(phases)
    plot(seen, args.out / "load.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
