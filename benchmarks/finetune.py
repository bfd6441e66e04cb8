"""Fine-tuning on instruments that the demo's model does not know: what it learns and forgets, and how long that takes.

Ten instruments are rendered from General MIDI by two sound fonts (40 notes and short phrases each of either), asked
with four options, and tested on a third sound font. `jobs/finetune.py` is called as a user calls it, with the demo's
training questions as `--replay` and its test as `--old-test`; `--no-replay` leaves them out, `--lora` trains adapters
in place of the LM.
With `--task recordings` the sounds are real ones: labels of the demo's packages that its corpus does not have, parted
by recording.

- `before`, `after`: shares of right answers to the new test; `gain_points`: their difference, `gain_ci95` its interval.
- `old_points`: the same difference for the demo's own test (negative: forgotten), `old_ci95` its interval.
- `seconds`: of the whole command, scores before and after included.

Needs fluidsynth and the sound fonts of the demo's corpus (`data/demo/packages`). The last line is one
JSON object. With --quick: three instruments, eight sounds each, ten steps.

    python benchmarks/finetune.py [MODEL] [--task recordings] [--no-replay] [--lora] [--out DIR] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.synth.sounds import collect, packages
from af2_ray.synth.sounds.curate import grouped, pieces, split_clips
from af2_ray.synth.sounds.render import Phrase, play

INSTRUMENTS = {  # General MIDI programs, none of the demo's classes
    "accordion": 21,
    "alto saxophone": 65,
    "bagpipe": 109,
    "banjo": 105,
    "bassoon": 70,
    "clarinet": 71,
    "harpsichord": 6,
    "oboe": 68,
    "sitar": 104,
    "steel drums": 114,
}
LOWEST, HIGHEST = 48, 76  # MIDI keys of a first note
TRAIN_FONTS, TEST_FONT = packages.SOUNDFONTS[:2], packages.SOUNDFONTS[2]


def phrases(program: int, count: int, rng: np.random.Generator) -> list[Phrase]:
    """Notes and phrases of up to three notes."""
    found = []
    for _ in range(count):
        num = int(rng.integers(1, 4))
        steps = rng.choice([0, 2, 4, 5, 7, 9], num, replace=False)
        keys = tuple(int(key) for key in int(rng.integers(LOWEST, HIGHEST)) + steps)
        found.append(Phrase(program, keys, int(rng.integers(70, 120)), float(rng.uniform(0.7, 1.4)) / num))
    return found


def render(folder: Path, fonts: Sequence[Path], instruments: Sequence[str], count: int, seed: int) -> int:
    """Write `folder/<instrument>/<font>-<number>.flac`, `count` of each instrument and font; returns their number."""
    rng = np.random.default_rng(seed)
    written = 0
    for font in fonts:
        wanted = [(name, phrase) for name in instruments for phrase in phrases(INSTRUMENTS[name], count, rng)]
        for number, ((name, _), wave) in enumerate(zip(wanted, play(font, [p for _, p in wanted]), strict=True)):
            for piece in pieces(wave, max_pieces=1):
                place = folder / name.replace(" ", "_") / f"{font.stem}-{number:04d}.flac"
                place.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(place, piece, SAMPLE_RATE)
                written += 1
    return written


def make_instruments(out: Path, folders: dict[str, Path], quick: bool) -> None:
    """Render `<out>/train` with two sound fonts, `<out>/test` with the third."""
    fonts = {
        name: next(path for path in sorted(folders[name].rglob("*.sf[23]")) if not path.is_symlink())
        for name in packages.SOUNDFONTS
    }
    names = list(INSTRUMENTS)[: 3 if quick else None]
    count = 8 if quick else 40
    train = render(out / "train", [fonts[name] for name in TRAIN_FONTS], names, count, seed=0)
    test = render(out / "test", [fonts[TEST_FONT]], names, count, seed=1)
    print(f"{train} sounds to train on, {test} of another sound font to test on")


def make_recordings(out: Path, folders: dict[str, Path], known: set[str], quick: bool) -> None:
    """Write recordings of labels that the demo does not know, near-duplicates on one side."""
    clips = [clip for clip in collect.recorded(folders) if clip.label not in known]
    chosen = split_clips(grouped(clips), 3 if quick else 10, 6, 0)
    for number, clip in enumerate(chosen):
        part = "test" if clip.split == "test" else "train"
        place = out / part / clip.label.replace(" ", "_") / f"{number:04d}.flac"
        place.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place, clip.wave, SAMPLE_RATE)
    print(f"{len(chosen)} recordings of {sorted({clip.label for clip in chosen})}")


def make_sounds(out: Path, data: Path, task: str, quick: bool) -> None:
    """Write `<out>/train` and `<out>/test`, folders of label/clip, unless they are there."""
    if (out / "test").is_dir():
        return
    packages.install_programs(data / "packages")
    folders = packages.fetch(data / "packages")
    try:
        if task == "instruments":
            make_instruments(out, folders, quick)
        else:
            with (data / "sources.csv").open(newline="") as file:
                known = {row["label"] for row in csv.DictReader(file)}
            make_recordings(out, folders, known, quick)
    finally:
        shutil.rmtree(data / "packages" / "unpacked", ignore_errors=True)


def main() -> None:
    """Render, fine-tune, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/demo/stages/long/model", help="the demo's model")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="the demo's corpus (%(default)s)")
    parser.add_argument("--task", choices=("instruments", "recordings"), default="instruments", help="%(default)s")
    parser.add_argument("--out", type=Path, help="sounds and runs (runs/finetune-<task>)")
    parser.add_argument("--no-replay", action="store_true", help="train on the new sounds alone")
    parser.add_argument("--lora", action="store_true", help="train adapters in place of the LM")
    parser.add_argument("--quick", action="store_true", help="few sounds and steps: whether it works at all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    args = parser.parse_intermixed_args()
    out = args.out or Path(f"runs/finetune-{args.task}")
    out.mkdir(parents=True, exist_ok=True)
    make_sounds(out, args.data, args.task, args.quick)
    name = ("alone" if args.no_replay else "replay") + ("-lora" if args.lora else "")
    command = [sys.executable, "jobs/finetune.py", args.model, str(out / "train")]
    command += ["--test", str(out / "test"), "--run", str(out / name)]
    command += ["--old-test", str(args.data / "short/test.json")]
    if not args.no_replay:
        for part in ("single", "short"):
            command += ["--replay", str(args.data / part / "train.json")]
    if args.lora:
        targets = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
        command += ["stages.finetune.trainable=[clap, transform, xattn, tokens, lora]"]
        command += [f"stages.finetune.lora={{rank: 16, alpha: 32, targets: [{targets}]}}"]
        command += ["stages.finetune.optimizer.lr_scale={clap: 0.3, lora: 2}"]
    if args.quick:
        command += ["stages.finetune.steps=10"]
    started = time.perf_counter()
    subprocess.run([*command, *args.overrides], check=True)
    seconds = time.perf_counter() - started
    facts = json.loads((out / name / "finetune.json").read_text())
    new, old = facts["test"]["all"], facts["old_test"]["all"]
    print(
        json.dumps(
            {
                "before": new["before"],
                "after": new["after"],
                "gain_points": round(100 * new["change"], 1),
                "gain_ci95": new["change_ci95"],
                "old_points": round(100 * old["change"], 1),
                "old_ci95": old["change_ci95"],
                "seconds": round(seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
