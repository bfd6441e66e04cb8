"""Ask an exported model one question about one recording.

python jobs/ask.py runs/tiny/stages/long/model bell.flac "Which sound is heard? (A) dog (B) bell"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from af2_ray import console


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the answer on standard output, 2 for input that cannot be used."""
    args = _arguments(argv)
    from af2_ray.audio.decode import AudioError  # heavy imports after the arguments are checked
    from af2_ray.evaluate.predict import answer_one

    limits = {"max_windows": args.max_windows, "max_new_tokens": args.max_new_tokens}
    try:
        answer = answer_one(args.model, args.file, args.question, **limits)
    except (ValueError, AudioError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 2
    print(answer)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jobs/ask.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="exported model: a stage's `model` folder, local or s3://")
    parser.add_argument("file", metavar="FILE", help="recording: a path or an s3:// uri")
    parser.add_argument("question", metavar="QUESTION", help="options as `(A) dog (B) bell`, if there are any")
    parser.add_argument("--max-windows", type=int, default=30, help="10 s windows heard of the file (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of the answer (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(lambda: sys.exit(main()))
