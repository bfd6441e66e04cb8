"""What a person sees of a job: headings, progress bars, tables. Everything else goes to log files.

Used by `jobs/` alone; the library itself logs. Progress of a training step is read from its growing `metrics.jsonl`,
since the loop runs in other processes, perhaps on other machines.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table

from af2_ray.config import Corpus, Recipe, recipe_names
from af2_ray.machine import every
from af2_ray.runs.run import Run, finished, read_metrics
from af2_ray.storage.places import shown

if TYPE_CHECKING:
    from af2_ray.evaluate.paired import Comparison
    from af2_ray.synth.corpus import CorpusReport

POLL_S = 0.5
MOST_LETTERS = 14  # of a row's name: the table fits 80 columns
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = """
exit codes:
  0    done
  1    failed: something broke on the way; the same command goes on from where it stopped
  2    bad input: arguments, recipe, data, credentials or a request larger than the cluster; repeating it is no use
  130  interrupted (also by SIGTERM, as Kubernetes ends pods): the same command goes on
"""

_screen, _errors = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))  # while `logs_to` has both
console = Console(file=_screen, highlight=False, soft_wrap=not _screen.isatty())
errors = Console(file=_errors, highlight=False, soft_wrap=not _errors.isatty())


class _Parser(argparse.ArgumentParser):
    """Takes `RECIPE --run DIR key=value` as well as `RECIPE key=value --run DIR`."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def parser(
    description: str | None, *, epilog: str = "", recipe: bool = True, default: str | None = None
) -> argparse.ArgumentParser:
    """A job's argument parser.

    Args:
        description: docstring of the job.
        recipe: whether it takes a recipe and overrides of it.
        default: recipe that is taken where none is named.
    """
    result = _Parser(
        description=description, epilog=f"{epilog}\n{EXIT_CODES}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if not recipe:
        return result
    result.add_argument(
        "recipe",
        nargs="?" if default else None,
        default=default,
        help=f"a shipped recipe ({', '.join(recipe_names())}) or a .yaml file",
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="for instance stages.pretrain.steps=5")
    return result


def main(job: Callable[[], None]) -> None:
    """Run a job and turn its end into an exit code, with one line that says what is wrong (see EXIT_CODES)."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    _hide_loading_bars()
    try:
        job()
    except KeyboardInterrupt:
        errors.print("[bold]interrupted[/]: the same command goes on from the last checkpoint")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if is_bad_input(error):
            errors.print(f"[bold red]bad input:[/] {escape(str(error))}")
            sys.exit(EXIT_BAD_INPUT)
        logging.getLogger(__name__).exception("the job ended")
        errors.print(f"[bold red]failed:[/] {type(error).__name__}: {escape(str(error))}")
        sys.exit(EXIT_FAILED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _hide_loading_bars() -> None:
    """Keep the bars of transformers ("Loading weights") from between a job's own lines, in its workers too."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # it has read the environment already
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def is_bad_input(error: BaseException) -> bool:
    """Whether repeating the same command is of no use: a `ValueError`, or credentials that are missing or refused."""
    response = getattr(error, "response", None)  # botocore's ClientError
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return (
        isinstance(error, ValueError | PermissionError)
        or type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}
        or code
        in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
    )


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def check_tracking(recipe: Recipe, *, timeout_s: float = 5.0, tries: int = 3) -> None:
    """Fail in seconds if the recipe's MLflow server does not answer; once a job runs, an outage only costs a warning.

    Raises:
        ConnectionError: it does not answer, or not as MLflow does; the message names the key.
    """
    uri = recipe.tracking.uri
    if uri is None or not uri.startswith(("http://", "https://")):
        return
    reason: Exception | None = None
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s):
                return
        except OSError as error:  # URLError and HTTPError are
            reason = error
            time.sleep(attempt)
    raise ConnectionError(
        f"MLflow at tracking.uri={uri} does not answer ({reason}): start it, correct the uri, or leave tracking.uri out"
    )


def heading(title: str) -> None:
    """A stage heading."""
    console.print(Rule(f"[bold]{title}", align="left", style="dim"))


def table(*headings: str, title: str = "", num_left: int = 1) -> Table:
    """A table that fits 80 columns: no sides, no wrapped cells. Headings may have two lines.

    Args:
        num_left: number of columns that have words and are aligned left; the others have numbers.
    """
    result = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        result.add_column(heading, justify="left" if place < num_left else "right", no_wrap=True)
    return result


def shortened(name: str, names: Sequence[str]) -> str:
    """A row's name as a cell of a table of 80 columns, of a long one the part that tells it from the others."""
    name = shown(name)
    if len(name) > MOST_LETTERS:
        parts = [shown(other).split("/") for other in names if len(other) > MOST_LETTERS]
        same = next((place for place, column in enumerate(zip(*parts, strict=False)) if len({*column}) > 1), 0)
        rest = "/".join(name.split("/")[same:])[: MOST_LETTERS - 1]
        name = f"…{rest}" if same else f"{rest}…"
    return escape(name)


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal and no sign; a dash for none."""
    return "-" if share is None else f"{100 * share:.1f}"


def comparison(result: Comparison, title: str) -> Table:
    """A row for all questions, each skill and each duration: right answers before and after, and their change."""
    headings = ("asked", "before", "after", "change", "95 %\nfrom, to", "better/\nworse", "chance")
    found = table("", *headings, title=f"{title}: right answers, %")
    durations = {f"{band} s": row for band, row in result.by_duration.items()}
    for section in ({"all": result.all} if result.all else {}, result.by_skill, durations):
        for name, row in section.items():
            change = f"{100 * row.change:+.1f}"
            ci95 = "-" if row.change_ci95 is None else "{:+.1f}, {:+.1f}".format(*(100 * x for x in row.change_ci95))
            shares = (percent(row.before), percent(row.after), change, ci95)
            found.add_row(
                shortened(name, [*section]),
                str(row.questions),
                *shares,
                f"{row.better}/{row.worse}",
                percent(row.chance),
            )
        found.add_section()
    return found


def comparison_notes(result: Comparison) -> Iterator[str]:
    """What stands beside the table: captions, and the questions that only one of the two answered."""
    if result.all is None:
        yield "no question was answered by both, captions apart"
    if result.captions:
        before, after = result.captions["before"], result.captions["after"]
        figures = [("in exactly the true words, %", *(percent(side["exact"]) for side in (before, after)))]
        if before["event_f1"] is not None and after["event_f1"] is not None:
            figures.append(("event F1", f"{before['event_f1']:.2f}", f"{after['event_f1']:.2f}"))
        yield f"{before['captions']} captions: " + "; ".join(f"{name} {one} -> {two}" for name, one, two in figures)
    for side, count in (("before", result.only_before), ("after", result.only_after)):
        if count:
            yield f"{count} questions were answered only {side}: they are left out of the comparison"


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar; yields a function that sets (done, note). Off a terminal it prints one line at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


def corpus(settings: Corpus) -> CorpusReport:
    """Make a recipe's corpus: heading, bar, what could not be had and why, counts."""
    from af2_ray.synth.corpus import make_corpus, num_scenes

    heading("corpus")
    with _warnings_shown("af2_ray.synth"), bar("scenes", num_scenes(settings)) as update:
        report = make_corpus(settings, progress=lambda done, _, what: update(done, what))
    counts = f"{report.num_source_clips} source clips of {report.num_classes} classes"
    console.print(f"{counts}, {report.hours:.1f} h of scenes in {report.dir}")
    return report


@contextmanager
def watch(title: str, folder: Path, num_steps: int) -> Iterator[None]:
    """Heading and progress bar of a training step, from the metrics it writes to `folder`."""
    heading(title)
    if finished(folder):
        console.print("done before")
        yield
        return
    with bar("steps", num_steps) as update:

        def show() -> None:
            if history := read_metrics(folder):
                update(history[-1]["step"], f"loss {history[-1]['loss']:.3f}")

        try:
            with every(POLL_S, show):
                yield
        finally:
            show()


def disk(recipe: Recipe, run: Run) -> None:
    """Say how much disk a run will take, and where there is too little: it would end in the middle."""
    from af2_ray.train.disk import amount, forecast, shortages

    try:
        needs = forecast(recipe, run.uri or str(run.root))
    except (ValueError, OSError) as error:  # the sizes of an LM that is not here yet
        console.print(f"disk: not known before the language model is fetched ({error})", markup=False)
        return
    parts = ", ".join(f"{need.what} {amount(need.size)}" for need in needs)
    console.print(f"disk: about {amount(sum(need.size for need in needs))} in all ({parts})")
    for line in shortages(needs):
        console.print(f"[bold red]too little disk:[/] {line}; `checkpoints.keep` and jobs/clean.py make room")


@contextmanager
def _warnings_shown(*names: str) -> Iterator[None]:
    """Within the block warnings of these modules are on the console, not only in the log."""
    handler = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Send all output of this process to a file, but the console's: logging, warnings, what native code prints.

    Warnings that a file of the run is damaged are on the console too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    with path.open("a") as file:
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            with _warnings_shown("af2_ray.storage.files", "af2_ray.train.mend"):
                yield
        except Exception:
            logging.getLogger(__name__).exception("the job ended")
            raise
        finally:
            for descriptor, before in zip((1, 2), saved, strict=True):
                os.dup2(before, descriptor)
                os.close(before)


@contextmanager
def cluster(log_dir: Path) -> Iterator[Any]:
    """Join the Ray cluster this job was submitted to, or start one on this machine for the time of the job.

    Ray's and the workers' output goes to Ray's session logs, not to the console; `logs/ray` in the run links there.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    from af2_ray.cluster import connect

    owned = not ray.is_initialized()
    context = connect(
        ignore_reinit_error=True,
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    with suppress(OSError):
        log_dir.mkdir(parents=True, exist_ok=True)
        link = log_dir / "ray"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(ray._private.worker._global_node.get_logs_dir_path()))
    try:
        yield context
    finally:
        if owned:
            ray.shutdown()
