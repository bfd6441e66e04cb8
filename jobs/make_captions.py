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
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from af2_ray import console
from af2_ray.llm.client import Client, Endpoint
from af2_ray.llm.journal import Journal
from af2_ray.storage.stores import scratch
from af2_ray.synth.captions.by_grammar import GrammarCaptions
from af2_ray.synth.captions.by_llm import LlmCaptions
from af2_ray.synth.generate import failed_path, make_captions, read_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Make the sets, and print how many and what they cost; more failures than allowed are exit code 1."""
    args = _arguments(argv)
    endpoint = Endpoint(args.model, args.base_url, *args.price)
    journal = Journal(args.cache) if args.cache else None
    rows = read_rows(args.captions)
    if args.engine == "llm" and not args.model:
        raise ValueError("--engine llm needs --model")
    engine = (
        LlmCaptions(Client(endpoint), args.positives, args.negatives, journal, judged=not args.no_judge)
        if args.engine == "llm"
        else GrammarCaptions.of((row["caption"] for row in rows), args.positives, args.negatives, args.seed)
    )
    with console.cluster(scratch("captions")):
        failed, spent = make_captions(rows, engine, args.out, args.concurrency)
    write = partial(console.console.print, soft_wrap=True)
    write(f"{len(rows) - failed} of {len(rows)} captions have their sets in {args.out}")
    if failed:
        write(f"{failed} have not: {failed_path(args.out)} says why")
    if args.engine == "llm":
        tokens = f"{spent['prompt_tokens']:,} + {spent['completion_tokens']:,} tokens"
        requests = f"{spent['requests']} requests ({spent['cached']} captions from the cache)"
        write(f"{requests}, {tokens}, cost {endpoint.cost(spent):.2f}")
    if failed > args.max_bad_share * len(rows):
        sys.exit(console.EXIT_FAILED)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("captions", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--engine", choices=("grammar", "llm"), default="grammar")
    parser.add_argument("--positives", type=int, default=3, help="true captions a clip, its own included (%(default)s)")
    parser.add_argument("--negatives", type=int, default=3, help="wrong ones for each of them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the grammar's draws (%(default)s)")
    parser.add_argument("--model", default="", help="name of the LLM")
    parser.add_argument("--base-url", help="its endpoint; none: OpenAI's")
    parser.add_argument("--cache", type=Path, help="folder of its answers")
    parser.add_argument("--no-judge", action="store_true", help="do not ask which wrong captions could be true")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (%(default)s)")
    parser.add_argument(
        "--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="price of a million tokens"
    )
    parser.add_argument("--max-bad-share", type=float, default=0.05, help="captions that may have no set (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
