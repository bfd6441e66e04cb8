"""Answers of a model to the questions of a fine-tuning, before and after: made once, kept in the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from af2_ray.config import Stage
from af2_ray.data.samples import Sample, fingerprint
from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.predict import predict
from af2_ray.runs.run import Run, finished
from af2_ray.storage.files import read_rows, write_whole

FILE = "answers.jsonl"


def answers(run: Run, name: str, model: str, questions: Sequence[Sample], stage: Stage) -> list[Prediction]:
    """What a model answers to each question that it can be asked.

    Args:
        run: run that keeps them, in the folder `name`; if they are there, nothing is asked again.
        model: address of the model.
        questions: questions, in the order of the kept answers.
        stage: stage that says how much of a recording is heard.

    Raises:
        ValueError: the run keeps answers to other questions.
    """
    folder, asked = run.root / name, fingerprint(questions)
    done = finished(folder)
    if done is not None and done["questions"] != asked:
        raise ValueError(
            f"{run.address(folder)} has answers to other questions: give the run the tests that it began with, or "
            "another --run"
        )
    if done is None:
        evaluation = run.recipe.evaluation.model_copy(update={"max_windows": stage.max_windows})
        found, failures = predict(model, questions, evaluation, cluster=run.recipe.cluster)
        places = {id(sample): place for place, sample in enumerate(questions)}
        rows = [{"place": places[id(one.sample)], "text": one.text} | one.to_json() for one in found]
        _write(folder, rows)
        right = sum(prediction.right for prediction in found)
        facts = {"asked": len(found), "right": right, "unread": len(failures), "questions": asked}
        run.finish(folder, {"name": name, **facts})
    return [Prediction(questions[int(row["place"])], str(row["text"])) for row in read_rows(folder / FILE)]


def _write(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
