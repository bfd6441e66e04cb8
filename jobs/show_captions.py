"""Caption sets to be judged by ear: a page with a play button, what is said to be true, and what is said to be wrong.

    python jobs/show_captions.py data/demo/clap/test.captions.jsonl --num 100 --out build/captions.html

The page is one file: recordings are in it (OGG, the first 30 s). A judge ticks what is wrong; the page counts, and
`copy the verdict` gives the ticked captions as JSON. A clip that cannot be read is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from af2_ray import console
from af2_ray.audio.decode import AudioError, decode
from af2_ray.data.manifest import read_captions
from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.report.page import audio_uri, render

MOST_AUDIO_S = 30.0


def main(argv: Sequence[str] | None = None) -> None:
    """Draw clips, and write the page."""
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("captions", help="caption sets, as AF-CLAP trains on them")
    parser.add_argument("--num", type=int, default=100, help="clips to show (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which are drawn (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("captions.html"), help="the page (%(default)s)")
    args = parser.parse_args(argv)
    sets = read_captions(args.captions)
    drawn = np.random.default_rng(args.seed).permutation(len(sets))[: args.num]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page, num_shown = page_of([sets[place] for place in drawn], args.captions, len(sets))
    args.out.write_text(page, encoding="utf-8")
    size_mb = args.out.stat().st_size / 1e6
    console.console.print(f"{num_shown} clips in {args.out} ({size_mb:.1f} MB): open it in a browser", soft_wrap=True)


def page_of(sets: Sequence[CaptionSet], source: str, total: int) -> tuple[str, int]:
    """The page, and how many clips are on it."""
    clips, lost = [], []
    for each in sets:
        try:
            clips.append((each, audio_uri(decode(each.uri, each.offset_s, min(each.duration_s, MOST_AUDIO_S)), "ogg")))
        except AudioError as error:
            lost.append(str(error))
    page = render("captions.html", title="Captions to judge", clips=clips, lost=lost, source=source, total=total)
    return page, len(clips)


if __name__ == "__main__":
    console.main(main)
