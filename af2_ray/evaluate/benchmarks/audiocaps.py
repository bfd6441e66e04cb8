"""AudioCaps: `youtube_id, start_time, caption`, a row a caption; clips beside the CSV.

A clip of the test split has five rows, each with an `audiocap_id` of its own, and people name its file by youtube_id, Y
and youtube_id, either with the start, or an audiocap_id: any of these will do. https://github.com/cdjkim/audiocaps
"""

from __future__ import annotations

from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark, with_columns
from af2_ray.evaluate.benchmarks.csv_files import folder_of, read_captioned, read_rows
from af2_ray.evaluate.clap_score import score_captions
from af2_ray.evaluate.table import Table


def read(uri: str, root: str | None) -> Table:
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_rows(uri):
        rows.setdefault((row["youtube_id"], row.get("start_time", "")), []).append(row)
    clips = {}
    for (youtube, start), own in rows.items():
        names = [f"{prefix}{youtube}{tail}" for tail in (f"_{start}", "") for prefix in ("", "Y")]
        names += [row["audiocap_id"] for row in own if row.get("audiocap_id")]
        clips[tuple(names)] = [row["caption"] for row in own]
    return read_captioned(uri, root or folder_of(uri), clips)


AUDIOCAPS = EmbeddingBenchmark(with_columns(("youtube_id", "caption")), read, score_captions)
