"""Paraphrases and wrong captions for captions of your own, so that AF-CLAP can learn composition from them.

    python jobs/make_captions.py mine/captions.jsonl mine/train.captions.jsonl
    python jobs/make_captions.py IN OUT --engine llm --model NAME --base-url http://localhost:8001/v1 --cache build/said

IN has a JSON object a line: `name`, `duration`, `caption`. The grammar reads sounds, order and attributes off the
caption's joins; an LLM behind any OpenAI-compatible endpoint (key: OPENAI_API_KEY) writes more freely, and is checked.
OUT has the same rows in the same order, complete; a caption for which nothing usable was found goes to OUT.failed.jsonl
with the reason. With --cache a run that was stopped pays for nothing twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from af2_ray import console as job
from af2_ray.storage.stores import scratch
from af2_ray.synth.captions.by_llm import CaptionError, Endpoint, LlmCaptions, Spent
from af2_ray.synth.text.grammar import Captions, captions_of
from af2_ray.synth.text.parse import read_caption

MOST_SOUNDS = 4096  # that a wrong caption may name instead


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: written, 1: more captions failed than --max-bad-share, 2: input that cannot be used."""
    args = _arguments(argv)
    try:
        rows = read_rows(args.captions)
        engine = _engine(args, rows)
    except (ValueError, OSError) as error:
        print(f"make_captions: {error}", file=sys.stderr)
        return 2
    with job.cluster(scratch("captions")):
        failed, spent = write(_made(rows, engine, args.concurrency), args.out)
    console = Console(soft_wrap=True)
    console.print(f"{len(rows) - failed} of {len(rows)} captions have their sets in {args.out}")
    if failed:
        console.print(f"{failed} have not: {failed_path(args.out)} says why")
    if args.engine == "llm":
        tokens = f"{spent.prompt_tokens:,} + {spent.completion_tokens:,} tokens"
        cost = spent.cost(_endpoint(args))
        console.print(f"{spent.requests} requests ({spent.cached} captions from the cache), {tokens}, cost {cost:.2f}")
    return 1 if failed > args.max_bad_share * len(rows) else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of IN; a line that is none is a `ValueError` that names it."""
    rows = []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not all(isinstance(row[key], str) for key in ("name", "caption")):
                raise TypeError("name and caption must be strings")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an object with `name` and `caption`: {error}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no captions")
    return rows


Engine = Callable[[int, str], tuple[Captions | str, Spent]]
"""Number and text of a caption to its set, or to why there is none, and what that has cost."""


@dataclass(frozen=True)
class Grammar:
    """The corpus's own engine; `pool`: sounds that a wrong caption may name instead."""

    pool: tuple[str, ...]
    num_positives: int
    num_negatives: int
    seed: int

    def __call__(self, number: int, caption: str) -> tuple[Captions | str, Spent]:
        """The set of caption `number`, drawn anew for each."""
        try:
            return self._made(number, caption), Spent()
        except ValueError as error:
            return str(error), Spent()

    def _made(self, number: int, caption: str) -> Captions:
        composition, phrases = read_caption(caption)
        rng = np.random.default_rng([self.seed, number])
        others = {label: (label, label) for label in self.pool}
        made = captions_of(composition, others | dict(phrases), self.pool, self.num_positives, self.num_negatives, rng)
        return Captions(caption, made.paraphrases, made.negatives)


def by_llm(endpoint: Endpoint, options: dict[str, Any], number: int, caption: str) -> tuple[Captions | str, Spent]:
    """The set of a caption, and what it cost; one that is given up has cost something too."""
    engine = LlmCaptions(endpoint, **options)
    try:
        return engine(caption), engine.spent
    except CaptionError as error:
        return str(error), engine.spent


def _engine(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> Engine:
    sizes = {"num_positives": args.positives, "num_negatives": args.negatives}
    if args.engine == "llm":
        if not args.model:
            raise ValueError("--engine llm needs --model")
        return partial(by_llm, _endpoint(args), {**sizes, "cache": args.cache, "judge": not args.no_judge})
    pool: dict[str, None] = {}
    for row in rows:
        try:
            pool |= dict.fromkeys(read_caption(row["caption"])[1])
        except ValueError:
            continue  # told when its turn comes
    sounds = np.random.default_rng(args.seed).permutation(sorted(pool))[:MOST_SOUNDS]
    return Grammar(tuple(str(sound) for sound in sounds), **sizes, seed=args.seed)


def _endpoint(args: argparse.Namespace) -> Endpoint:
    prompt, completion = args.price
    return Endpoint(args.model, args.base_url, price_prompt=prompt, price_completion=completion)


def _one(item: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """A task: one caption. Rows travel as JSON, so that Arrow need not find a type for all of them."""
    number, row = int(item["number"]), json.loads(item["row"])
    made, spent = engine(number, row["caption"])
    cost = json.dumps(asdict(spent))
    if isinstance(made, str):
        return {"row": "", "failed": json.dumps({**row, "reason": made}, ensure_ascii=False), "spent": cost}
    told = row | {"positives": list(made.paraphrases), "negatives": [list(group) for group in made.negatives]}
    return {"row": json.dumps(told, ensure_ascii=False), "failed": "", "spent": cost}


def _made(rows: Sequence[dict[str, Any]], engine: Engine, concurrency: int) -> Iterable[dict[str, Any]]:
    """The rows with their sets, in order, from Ray Data's tasks."""
    import ray.data

    items = [{"number": number, "row": json.dumps(row)} for number, row in enumerate(rows)]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * concurrency))
    dataset.context.execution_options.preserve_order = True
    yield from dataset.map(partial(_one, engine=engine), num_cpus=0.1, concurrency=concurrency).iter_rows()


def write(made: Iterable[dict[str, Any]], out: Path) -> tuple[int, Spent]:
    """Write what was made and what failed, whole or not at all; how many failed, and what all of it cost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    failed, spent = 0, Spent()
    parts = [path.with_name(f".{path.name}.part") for path in (out, failed_path(out))]
    with parts[0].open("w") as good, parts[1].open("w") as bad:
        for each in made:
            (bad if each["failed"] else good).write(f"{each['failed'] or each['row']}\n")
            failed += bool(each["failed"])
            for key, value in json.loads(each["spent"]).items():
                setattr(spent, key, getattr(spent, key) + value)
    parts[0].replace(out)
    parts[1].replace(failed_path(out))
    if not failed:
        failed_path(out).unlink()
    return failed, spent


def failed_path(out: Path) -> Path:
    """Where captions without a set go."""
    return out.with_name(f"{out.name}.failed.jsonl")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--engine", choices=("grammar", "llm"), default="grammar")
    parser.add_argument("--positives", type=int, default=3, help="true captions a clip, its own included (%(default)s)")
    parser.add_argument("--negatives", type=int, default=3, help="wrong ones for each of them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the grammar's draws (%(default)s)")
    parser.add_argument("--model", default="", help="name of the LLM")
    parser.add_argument("--base-url", help="its endpoint; none: OpenAI's")
    parser.add_argument("--cache", type=Path, help="folder of its answers")
    parser.add_argument("--no-judge", action="store_true", help="do not ask which wrong captions could be true")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (%(default)s)")
    parser.add_argument(
        "--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens"
    )
    parser.add_argument("--max-bad-share", type=float, default=0.05, help="of captions without a set (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    job.main(lambda: sys.exit(main()))
