"""Settings of the corpus, the blend and its batches."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from af2_ray.config.base import Split, Strict, later


class SceneSet(Strict):
    """One set of composed scenes: how many, how long, with how many events, from which split of the source clips."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    split: Split
    num_scenes: int = Field(ge=2)
    duration_s: tuple[float, float] = Field(strict=False)
    num_events: tuple[int, int] = Field((1, 3), strict=False)
    questions_per_scene: int = Field(3, ge=0)
    captions_per_scene: int = Field(1, ge=0, le=1, description="requests to describe the clip, 0 or 1 a scene")


class Corpus(Strict):
    """A corpus made by `jobs/make_data.py` from free recordings (or from a folder of `label/clip.*`)."""

    dir: str = "data/demo"
    sources: str = Field("packages", description="`packages`, `rendered`, or a folder of label/clip.*")
    num_classes: int = Field(20, ge=2)
    min_clips: int = Field(4, ge=2)
    seed: int = 0
    num_positives: int = Field(3, ge=1)
    num_negatives: int = Field(3, ge=0)
    sets: list[SceneSet]


class Dataset(Strict):
    """One manifest of a blend, in any format (README.md, "Formats"); `weight` counts epochs, 0.5 is half of one."""

    manifest: str
    root: str | None = None
    weight: float = Field(1.0, gt=0)
    columns: dict[str, str] = later(
        {}, description="columns by our keys, where they have names of their own: `{audio: path, question: q}`"
    )


def parse_columns(text: str) -> dict[str, str]:
    """`Dataset.columns` as a command gives them: `audio=path,question=q,answer=a`; an empty text: none.

    Raises:
        ValueError: a part that is not `key=column`, or a key that comes twice.
    """
    found: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        key, mark, column = (side.strip() for side in part.partition("="))
        if not (mark and key and column):
            raise ValueError(f"columns: {part!r} is not key=column: write for instance audio=path,question=q,answer=a")
        if key in found:
            raise ValueError(f"columns: {key!r} comes twice: give one column for it")
        found[key] = column
    return found


class Budget(Strict):
    """The two-sided budget of a row (one micro-batch) and the rows of a step (docs/paper.md, "Batching")."""

    windows_per_row: int = Field(64, ge=1)
    text_tokens_per_row: int = Field(2048, ge=16)
    questions_per_clip: int = Field(
        4, ge=1, description="most questions on one encoding of a clip, end to end in one row of text"
    )
    step_batches: int = Field(240, ge=1)
    balanced_rows: int | None = Field(
        None,
        ge=1,
        description="rows of like cost that follow each other, a divisor of step_batches; none: all of a step",
    )
    tokens_per_window: int = Field(64, ge=1, description="cost of encoding a window, in text tokens")
    attention_tokens: int | None = Field(
        None, ge=1, description="length at which attention costs as much as all else; none: cost is linear in length"
    )

    @model_validator(mode="after")
    def _runs_fill_a_step(self) -> Budget:
        if self.balanced_rows and self.step_batches % self.balanced_rows:
            raise ValueError(f"balanced_rows={self.balanced_rows} does not divide step_batches={self.step_batches}")
        return self


class Access(Strict):
    """What a manifest may name, beside files and `s3://` and `gs://` addresses (docs/security.md)."""

    schemes: list[str] = Field([], description="further schemes of fsspec that may be opened, for instance abfs")
    parents: bool = Field(
        False, description="whether a local manifest's names may lead out of the folder of its recordings by `..`"
    )

    @model_validator(mode="after")
    def _are_names(self) -> Access:
        for scheme in self.schemes:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
                raise ValueError(f"schemes: {scheme!r} is no scheme: give names such as abfs, without '://'")
        return self


class Faults(Strict):
    """What a run may lose before it ends with an error."""

    max_bad_share: float = Field(0.02, ge=0, le=1, description="share of samples that may be set aside")
    max_failures: int = Field(2, ge=0, description="worker-group restarts a stage may need")
