"""The whole chain on this machine: corpus, LM, AF-CLAP, three stages, evaluation, an answer over HTTP, a report.

What is finished is skipped; a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from af2_ray import console
from af2_ray.config import load_recipe
from af2_ray.machine import every, watch_memory
from af2_ray.runs.run import Run, finished, mark_finished, read_metrics
from af2_ray.storage.files import write_whole
from af2_ray.storage.places import is_remote

if TYPE_CHECKING:
    from af2_ray.data.samples import Sample
    from af2_ray.runs.tracking import Tracker
    from af2_ray.synth.corpus import CorpusReport

Result = TypeVar("Result")
TICK_S = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Go through the chain, and print its outcome."""
    parser = console.parser(__doc__, epilog="example:\n  python jobs/demo.py tiny --run runs/demo", default="tiny")
    parser.add_argument("--run", metavar="DIR", default="runs/demo", help="run directory (default: %(default)s)")
    arguments = parser.parse_args(argv)
    from af2_ray.runs.tracking import Tracker  # heavy imports after the arguments are checked
    from af2_ray.train.stages import train_run

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.corpus is None or recipe.clap is None:
        raise ValueError(f"the demo needs a corpus and a clap block; recipe {recipe.name!r} has not both")
    if is_remote(arguments.run) or is_remote(recipe.corpus.dir):
        raise ValueError("the demo keeps run and data on this machine; with object storage use jobs/train.py")
    run = Run.open(recipe, arguments.run)
    clock = Clock(run.root / "timing.json")
    with run.lock(), watch_memory() as peak:
        with console.logs_to(run.root / "logs" / "demo.log"):
            console.disk(recipe, run)
            corpus = clock.time("corpus", partial(console.corpus, recipe.corpus))
            with console.cluster(run.root / "logs"):
                steps = clock.time("training", lambda: train_run(run, watch=console.watch))
                tracker = Tracker(run)  # with the MLflow runs that training has made
                scores = clock.time("evaluation", lambda: _once(run, "evaluation", partial(_evaluate, tracker=tracker)))
                answer = clock.time("serving", lambda: _once(run, "serving", _ask))
            summary = clock.time("report", lambda: _summarise(run, tracker, corpus, steps, scores, answer))
        clock.keep_peak(peak.gib)
        total_s = round(sum(clock.seconds.values()), 1)
        summary |= {"seconds": clock.seconds, "total_s": total_s, "peak_rss_gib": round(clock.peak_gib, 2)}
        write_whole(run.root / "summary.json", json.dumps(summary, indent=1))
        report = _report(run, tracker, summary, scores, answer)
    _show(summary)
    console.console.print(f"\nreport:  {report}\nsummary: {run.root / 'summary.json'}\nmodel:   {run.model_dir}")


def _once(run: Run, name: str, step: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """A step's facts: made now, or kept where it has been finished."""
    console.heading(name)
    if done := finished(run.root / name):
        console.console.print("done before")
        return done
    return mark_finished(run.root / name, step(run))


def _evaluate(run: Run, tracker: Tracker) -> dict[str, Any]:
    """Scores of the run's model and encoder on unseen source clips, beside the controls."""
    from af2_ray.evaluate.evaluate import choose_examples, evaluate_run
    from af2_ray.synth.sounds.bank import Bank

    recipe = run.recipe
    assert recipe.corpus is not None
    train = {dataset.manifest: dataset for stage in recipe.stages for dataset in stage.data}
    result = evaluate_run(
        run.model_dir,
        recipe.evaluation,
        train=list(train.values()),
        clap_dir=run.clap_dir / "model",
        out_dir=run.root / "evaluation",
        cluster=recipe.cluster,
        clap_max_windows=recipe.clap.max_windows if recipe.clap else 1,
        wordings=Bank(Path(recipe.corpus.dir) / "sources").phrases,
    )
    child = tracker.child("evaluation", {"model": str(run.model_dir)})
    facts = result.to_json()
    scores = {f"{name}/{key}": value for name in ("accuracy", "clap") for key, value in facts[name].items()}
    tracker.log_history(child, [{"step": 0, **scores}])
    tracker.finish("evaluation")
    examples = [prediction.to_json() for prediction in choose_examples(result.predictions)]
    failures = facts.pop("set_aside")
    return facts | {"examples": examples, "failures": failures}


def _ask(run: Run) -> dict[str, Any]:
    """Serve the exported model, ask it one held-out question as any OpenAI client would, stop it."""
    from openai import OpenAI

    from serve_apps.af2 import run_app

    sample = _question(run)
    with run_app(run.model_dir, str(run.root / "recipe.yaml")) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        audio = base64.b64encode(Path(sample.uri).read_bytes()).decode()
        content: list[Any] = [
            {"type": "input_audio", "input_audio": {"data": audio, "format": "flac"}},
            {"type": "text", "text": sample.prompt},
        ]
        started = time.perf_counter()
        reply = client.chat.completions.create(
            model=run.recipe.serve.model_name, messages=[{"role": "user", "content": content}]
        )
        latency_s = time.perf_counter() - started
    text = reply.choices[0].message.content or ""
    console.console.print(f"POST {url}/chat/completions  {Path(sample.uri).name}\nQ  {sample.prompt}\nA  {text}")
    facts = {"question": sample.prompt, "expected": sample.answer, "text": text, "uri": sample.uri}
    return facts | {"latency_s": round(latency_s, 2)}


def _question(run: Run) -> Sample:
    """The held-out question of the demo: the first about the order of sounds in a short clip, or the recipe's own."""
    from af2_ray.data.manifest import read_samples
    from af2_ray.data.samples import Sample

    evaluation = run.recipe.evaluation
    first = evaluation.manifests[0]
    samples = read_samples(first.manifest, first.root, first.columns)
    chosen = next((s for s in samples if s.skill == "identification" and s.duration_s <= 15), samples[0])
    return chosen if evaluation.ask is None else Sample(**{**asdict(chosen), "prompt": evaluation.ask, "answer": ""})


def _summarise(
    run: Run,
    tracker: Tracker,
    corpus: CorpusReport,
    steps: list[dict[str, Any]],
    scores: dict[str, Any],
    answer: dict[str, Any],
) -> dict[str, Any]:
    """The facts of the run, as `summary.json` has them."""
    tracker.log_params(tracker.parent(), {"corpus.sha256": corpus.sha256})
    keys = (
        "name",
        "steps",
        "loss_first",
        "loss_last",
        "padding_share",
        "padding_share_unplanned",
        "windows_per_s",
        "seconds",
    )
    stages = {stage.name for stage in run.recipe.stages}
    return {
        "corpus": {
            "source_clips": corpus.num_source_clips,
            "classes": corpus.num_classes,
            "hours": corpus.hours,
            "sha256": corpus.sha256,
        },
        "steps": [{key: facts[key] for key in keys if key in facts} for facts in steps],
        "stages": [{key: facts[key] for key in keys} for facts in steps if facts["name"] in stages],
        "clap": scores["clap"],
        "accuracy": scores["accuracy"],
        "answer": {key: answer[key] for key in ("question", "expected", "text")},
        "mlflow_runs": tracker.num_runs(),
    }


def _report(
    run: Run, tracker: Tracker, summary: dict[str, Any], scores: dict[str, Any], answer: dict[str, Any]
) -> Path:
    """Write `report.html` and log it with the summary."""
    from af2_ray.evaluate.report.run import licence_rows, write_report
    from af2_ray.evaluate.scenes import read_scenes, scenes_uri_of

    path = run.root / "report.html"
    folders = {"lm": run.lm_dir, "clap": run.clap_dir} | {s.name: run.stage_dir(s.name) for s in run.recipe.stages}
    scene = read_scenes(scenes_uri_of(run.recipe.evaluation.manifests[0].manifest)).get(Path(answer["uri"]).name)
    assert run.recipe.corpus is not None
    write_report(
        path,
        summary,
        losses={name: [(row["step"], row["loss"]) for row in read_metrics(folder)] for name, folder in folders.items()},
        details=scores["details"],
        scene={"uri": answer["uri"], "duration_s": scene["duration"], "events": scene["events"]} if scene else None,
        predictions=scores["examples"],
        corpus=licence_rows(Path(run.recipe.corpus.dir) / "sources.csv"),
    )
    for file in (path, run.root / "summary.json"):
        tracker.log_artifact(tracker.parent(), file)
    return path


def _show(summary: dict[str, Any]) -> None:
    """The outcome in a few lines."""
    accuracy, clap = summary["accuracy"], summary["clap"]
    console.heading("outcome")
    controls = ", ".join(f"{name} {accuracy[name]:.1%}" for name in ("deaf", "majority", "text_only"))
    console.console.print(
        f"accuracy on unseen source clips {accuracy['all']:.1%} of {accuracy['questions']} questions ({controls})\n"
        f"AF-CLAP text-to-audio R@1 {clap['t2a_r1']:.1%} of {clap['gallery']} "
        f"(chance {clap['t2a_r1_chance']:.1%}), order {clap['order_accuracy']:.1%}\n"
        f"{summary['total_s'] / 60:.1f} min, peak {summary['peak_rss_gib']:.1f} GiB"
    )


class Clock:
    """Seconds of each step until it was first done, and the memory peak; kept over interruptions, kills included."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.done: list[str] = kept.get("done", [])
        self.peak_gib: float = kept.get("peak_gib", 0.0)

    def time(self, name: str, step: Callable[[], Result]) -> Result:
        """Run a step and add its seconds to what it took before an interruption; a repetition does not count."""
        if name in self.done:
            return step()
        before, started = self.seconds.get(name, 0.0), time.perf_counter()

        def keep() -> None:
            self.seconds[name] = round(before + time.perf_counter() - started, 1)
            self._keep()

        try:
            with every(TICK_S, keep):  # a killed process has no time to write
                result = step()
            self.done.append(name)
            return result
        finally:
            keep()

    def keep_peak(self, gib: float) -> None:
        """Remember the highest peak of all calls."""
        self.peak_gib = max(gib, self.peak_gib)
        self._keep()

    def _keep(self) -> None:
        kept = {"seconds": self.seconds, "done": self.done, "peak_gib": self.peak_gib}
        write_whole(self._path, json.dumps(kept, indent=1))


if __name__ == "__main__":
    console.main(main)
