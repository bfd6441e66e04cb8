"""Answer every question of a manifest, or one question of every clip, on a Ray cluster: a row a sample, in input order.

    python jobs/infer.py runs/demo/stages/long/model data/demo/short/test.json --out answers.jsonl
    python jobs/infer.py MODEL clips.jsonl --question "What is heard?" --actors 8 --out s3://bucket/labels.parquet

Stopped and started again, it goes on with what is not done. A clip that cannot be read has an `error` in its row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from af2_ray import console
from af2_ray.config import Serve, load_recipe, parse_columns
from af2_ray.storage.places import allow, locate, write_text


def main(argv: Sequence[str] | None = None) -> None:
    """Answer, chunk by chunk, and join the chunks."""
    args = _arguments(argv)
    if not args.out.endswith((".jsonl", ".parquet")):
        raise ValueError(f"--out {args.out!r}: name a file that ends in .jsonl or .parquet")
    from af2_ray.data.durations import fill_durations  # heavy imports after the arguments are checked
    from af2_ray.data.manifest import read_samples
    from af2_ray.data.samples import fingerprint
    from af2_ray.engine import batch
    from af2_ray.storage.stores import scratch

    settings = _settings(args)
    model = args.model if "://" in args.model else str(Path(args.model).absolute())
    facts = batch.model_facts(model)
    max_windows = min(args.max_windows, facts["max_windows"] or args.max_windows)
    read = read_samples(args.manifest, args.root, parse_columns(args.columns))
    samples, unread = fill_durations(read, args.manifest, fallback=str(scratch("durations")))
    questions, refused = batch.questions_of(samples, args.question, unread)
    chunks = batch.plan_chunks(questions, args.chunk, max_windows)
    out = args.out if "://" in args.out else str(Path(args.out).absolute())
    folder = f"{out}.parts"
    _check_same_job(
        folder,
        {
            "model": model,
            "version": facts["version"],
            "samples": fingerprint(list(samples)),
            "root": args.root,
            "question": args.question,
            "chunk": args.chunk,
            "max_windows": max_windows,
            "max_new_tokens": args.max_new_tokens,
        },
    )
    there = batch.parts_there(folder)
    counts = f"{len(questions)} questions in {len(chunks)} chunks, {len(there)} done before"
    console.heading(f"{counts}; {len(refused)} set aside")
    left = {number: chunk for number, chunk in enumerate(chunks) if number not in there}
    limits = batch.AnswerLimits(max_windows, args.max_new_tokens)
    done, errors = 0, len(refused)
    with console.cluster(scratch("infer")), console.bar("chunks", len(chunks)) as update:
        found = batch.answer_on_ray(model, left, settings, limits, batch.server_actors(settings, args.actors))
        for place, (number, results) in enumerate(found, start=1):
            batch.write_rows(batch.part_uri(folder, number), [result.to_row() for result in results])
            failed = sum(result.answer is None for result in results)
            done, errors = done + len(results) - failed, errors + failed
            update(len(there) + place, f"{done} answers, {errors} errors")
    num_rows, num_answers = batch.join(folder, len(chunks), [result.to_row() for result in refused], out)
    console.console.print(f"{num_rows} rows in {out}")
    if num_rows and not num_answers:
        raise ValueError(f"no question was answered: the `error` of each row of {out} says why")


def _settings(args: argparse.Namespace) -> Serve:
    """The size of an engine: the recipe's, or the default."""
    settings = Serve()
    if args.recipe:
        recipe = load_recipe(args.recipe, args.overrides)
        allow(recipe.access.schemes, parents=recipe.access.parents)
        settings = recipe.serve
    return settings.model_copy(update={"num_slots": args.slots or settings.num_slots})


def _check_same_job(folder: str, facts: dict[str, object]) -> None:
    """Chunks of another job must not be taken for this one's."""
    fs, path = locate(folder)
    file, text = f"{path}/job.json", json.dumps(facts, sort_keys=True)
    if not fs.exists(file):
        write_text(f"{folder}/job.json", text)
    elif fs.cat_file(file).decode() != text:
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        raise ValueError(
            f"{folder} holds the chunks of another model, manifest or setting: choose another --out "
            f"(for instance with {mark} in its name) or remove that folder"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("model", metavar="MODEL", help="exported model: a stage's `model` folder, local or s3://")
    parser.add_argument("manifest", metavar="MANIFEST", help="any manifest that training takes; answers may be empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--out", required=True, help="answers: .jsonl or .parquet, local or s3://")
    parser.add_argument("--question", help="ask this of every clip instead of the manifest's prompts")
    parser.add_argument("--root", help="folder of the audio (default: the manifest's own)")
    parser.add_argument(
        "--columns",
        default="",
        metavar="KEY=COLUMN,...",
        help="columns by our keys, if named otherwise: audio=path,question=q,answer=a",
    )
    parser.add_argument("--recipe", default="", help="whose `serve` block sizes the engines (default: the defaults)")
    parser.add_argument("--actors", type=int, default=1, help="engines (%(default)s)")
    parser.add_argument("--slots", type=int, default=0, help="answers an engine writes at one time (the recipe's)")
    parser.add_argument("--chunk", type=int, default=256, help="questions a chunk (%(default)s)")
    parser.add_argument(
        "--max-windows",
        type=int,
        default=30,
        help="10 s windows heard of a clip at most (%(default)s, or fewer if the model hears fewer)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
