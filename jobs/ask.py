"""Ask an exported model one question about one recording.

python jobs/ask.py runs/tiny/stages/long/model bell.flac "Which sound is heard? (A) dog (B) bell"
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray import console


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answer."""
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("model", metavar="MODEL", help="exported model: a stage's `model` folder, local or s3://")
    parser.add_argument("file", metavar="FILE", help="recording: a path or an s3:// uri")
    parser.add_argument("question", metavar="QUESTION", help="options as `(A) dog (B) bell`, if there are any")
    parser.add_argument("--max-windows", type=int, default=30, help="10 s windows heard of the file (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of the answer (%(default)s)")
    arguments = parser.parse_args(argv)
    from af2_ray.evaluate.predict import answer_one  # heavy imports after the arguments are checked

    limits = {"max_windows": arguments.max_windows, "max_new_tokens": arguments.max_new_tokens}
    answer = answer_one(arguments.model, arguments.file, arguments.question, **limits)
    console.console.print(answer, markup=False, emoji=False, soft_wrap=True)


if __name__ == "__main__":
    console.main(main)
