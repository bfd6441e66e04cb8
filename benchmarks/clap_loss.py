"""Memory and time of AF-CLAP's loss with its backward pass against the batch: ours beside the formula written down.

The formula (docs/paper.md, "AF-CLAP") makes the table of all similarities, clips x captions, and autograd keeps it
several times over. Ours takes a part of the rows at a time. Caption sets are as in the paper (M = N = 3, joint width
512; 256 with --quick), in float32, in one process that holds the whole batch; features and their gradients are the same
for both.

Peak memory: a process of its own for each point, whose allocator hands every tensor back to the kernel when it is
freed; from the peak of the second pass goes what the process held before it (features, and the gradients' place), so
both are charged with what the loss itself needs. Time: the quicker of some passes, both in turn in one process.

Writes a plot; the last line is one JSON object: MiB and seconds by batch, and ours over the formula's at the largest.

    python benchmarks/clap_loss.py [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as nnf
from torch import Tensor

from af2_ray.train.losses import afclap_loss_sum

BATCHES = (64, 256, 1024, 4096)
QUICK_BATCHES = (64, 4096)
M, N = 3, 3
WAYS = ("ours", "formula")
PLOT = Path("build/benchmarks/clap_loss.png")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def formula(
    audio: Tensor, positives: Tensor, negatives: Tensor, positive_mask: Tensor, negative_mask: Tensor, scale: Tensor
) -> Tensor:
    """The loss as it is printed, in log-sum-exp form, with masks: what one writes without thinking of memory."""
    lowest = torch.finfo(audio.dtype).min
    to_positives = scale * torch.einsum("cj,gmj->cgm", audio, positives)
    to_positives = to_positives.masked_fill(~positive_mask, lowest)
    own_negatives = scale * torch.einsum("cj,cmnj->cmn", audio, negatives)
    own_negatives = own_negatives.masked_fill(~negative_mask, lowest)
    own = to_positives.diagonal(dim1=0, dim2=1).T
    everything = torch.cat([to_positives.flatten(1), own_negatives.flatten(1)], dim=1)
    return (everything.logsumexp(dim=1) - own.logsumexp(dim=1)).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {"ours": afclap_loss_sum, "formula": formula}


def inputs(num_sets: int, width: int) -> list[Tensor]:
    """Random unit vectors with gradients, masks that leave one caption in eight out, and the factor."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_sets, width), (num_sets, M, width), (num_sets, M, N, width))
    features = [nnf.normalize(torch.randn(shape, generator=generator), dim=-1).requires_grad_() for shape in shapes]
    masks = [torch.rand(shape[:-1], generator=generator) > 1 / 8 for shape in shapes[1:]]
    masks[0][:, 0] = True
    return [*features, *masks, torch.tensor([14.0]).requires_grad_()]


def peak_mib(way: str, num_sets: int, width: int) -> float:
    """Peak MiB of loss and backward, less what this process held before."""
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, 2**16)
    malloc.mallopt(M_TRIM_THRESHOLD, 0)
    torch.set_num_threads(1)
    LOSSES[way](*inputs(8, width)).backward()  # what libraries set up at first use is not the loss's
    args = inputs(num_sets, width)
    for tensor in args:
        if tensor.requires_grad:
            tensor.grad = torch.zeros_like(tensor)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held = memory_mib("VmRSS")
    LOSSES[way](*args).backward()
    return memory_mib("VmHWM") - held


def memory_mib(name: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def seconds(num_sets: int, width: int, repeats: int) -> dict[str, float]:
    """The quickest pass of each way, and a check that both give the same loss and gradients."""
    torch.set_num_threads(1)
    args = inputs(num_sets, width)
    best = dict.fromkeys(WAYS, float("inf"))
    found: dict[str, list[Tensor]] = {}
    for _ in range(repeats):
        for way in WAYS:
            started = time.perf_counter()
            loss = LOSSES[way](*args)
            gradients = torch.autograd.grad(loss, [args[0], args[1], args[2], args[5]])
            best[way] = min(best[way], time.perf_counter() - started)
            found[way] = [loss.detach(), *gradients]
    for ours, theirs in zip(found["ours"], found["formula"], strict=True):
        if (ours - theirs).norm() > 1e-4 * theirs.norm():
            raise RuntimeError(f"the two ways differ at {num_sets} caption sets")
    return best


def in_own_process(function: Callable[..., object], *args: object) -> object:
    """Call it in a fresh fork: nothing was computed here, so no threads are lost by it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def plot(mib: dict[str, dict[int, float]], time_s: dict[str, dict[int, float]]) -> None:
    """Both curves of both measures to `PLOT`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, curves, label in zip(panels, (mib, time_s), ("peak, MiB", "loss and backward, s")):
        for way, values in curves.items():
            axes.loglog(list(values), list(values.values()), marker="o", label=way)
        axes.set(xlabel="caption sets in the batch", ylabel=label)
        axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Measure all batches both ways, plot, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_BATCHES} caption sets, width 256, one pass")
    quick = parser.parse_args().quick
    width, repeats = (256, 1) if quick else (512, 3)
    mib: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    time_s: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for num_sets in QUICK_BATCHES if quick else BATCHES:
        took = in_own_process(seconds, num_sets, width, repeats if num_sets > 256 else 10)
        for way in WAYS:
            mib[way][num_sets] = round(float(in_own_process(peak_mib, way, num_sets, width)), 1)  # type: ignore[arg-type]
            time_s[way][num_sets] = round(took[way], 4)  # type: ignore[index]
        print(f"{num_sets:5d}: " + ", ".join(f"{w} {mib[w][num_sets]} MiB {time_s[w][num_sets]} s" for w in WAYS))
    plot(mib, time_s)
    print(f"plot: {PLOT}")
    result: dict[str, object] = {f"{way}_mib": mib[way] for way in WAYS} | {f"{way}_s": time_s[way] for way in WAYS}
    for name, curves in (("memory_ratio", mib), ("time_ratio", time_s)):
        result[name] = round(curves["ours"][BATCHES[-1]] / curves["formula"][BATCHES[-1]], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
