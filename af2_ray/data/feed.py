"""The plan through Ray Data to the ranks.

One row of the dataset is one whole batch. The read yields plan rows' numbers only; a separate map with a fraction of a
CPU decodes and collates. Blocks hold one row, so with `preserve_order` (`data_config`) the split among W ranks is exact
round robin: row k goes to rank k mod W. The cursor is the number of rows consumed; a feed started at it gives exactly
the rows that an uninterrupted one would have given from there, to any number of workers.

The trade-off: a row costs Ray 20-30 ms, next to nothing beside a training step but ruinous if a row were a clip. The
plan travels through the object store once, as arrays that all decode processes of a machine read in place: tasks
themselves carry numbers. One read task runs at a time: it yields hundreds of numbers a second, and more of them would
each start a process of Ray before the first row is decoded, and hold the CPUs that decoding needs.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution import backpressure_policy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from af2_ray.data.batching import Plan, Row
from af2_ray.data.collate import ClapBatch, LmBatch
from af2_ray.data.columns import portable

if TYPE_CHECKING:
    from ray.train import DataConfig

BatchT = TypeVar("BatchT", LmBatch, ClapBatch)

_READ_ROWS = 1024  # plan rows of one read task, which yields numbers only
_READ_CPUS = 0.01  # of the one read task that runs at a time: it only counts
_PAUSES_S = (0.02, 0.16)  # of Ray Data's scheduler, from the first round after a change to the last of many without


class Collator(Protocol):
    """Decodes and collates a row of the plan (`collate.LmCollator`, `collate.ClapCollator`)."""

    def __call__(self, row: Row[Any]) -> LmBatch | ClapBatch: ...


@dataclass(frozen=True)
class Cursor:
    """The state of a feed: how many rows of which plan were consumed. `origin` says what the plan was made from."""

    rows: int
    fingerprint: str
    origin: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan[Any], rows: int = 0) -> Cursor:
        """The cursor after `rows` rows of `plan`."""
        return cls(rows, plan.fingerprint, dict(plan.origin))


def make_dataset(
    plan: Plan[Any], collator: Collator, *, start: int | Cursor = 0, decode_cpus: float = 0.25
) -> ray.data.Dataset:
    """The rows of a plan as a Ray dataset, in order, from `start` (the cursor) on.

    Args:
        plan: plan of `batching`.
        collator: function from a row to its batch, which runs in the decode tasks.
        start: number of rows consumed before, or a `Cursor`.
        decode_cpus: CPUs of a decode task; a fraction, or the trainer's workers leave it none to run on.

    Raises:
        ValueError: `start` is outside the plan, not at the start of an optimiser step, or of another plan.
    """
    first = check_cursor(plan, start)
    num_rows = len(plan) - first
    decode = _Decode(ray.put(collator), ray.put(replace(plan, items=portable(plan.items))), first)
    num_reads = max(1, num_rows // _READ_ROWS)
    # Not `ray.data.range`: its read tasks want a whole CPU each and never start beside the trainer's workers. Reading
    # must ask for other CPUs than decoding: Ray Data fuses what asks alike, and a task would decode a thousand rows.
    numbers = ray.data.read_datasource(
        Numbers(num_rows), num_cpus=_READ_CPUS, concurrency=1, override_num_blocks=num_reads
    )
    numbers.context.target_max_block_size = 1  # one row a block: round robin is exact only so
    numbers.context.custom_execution_callback_classes = [Pace]
    numbers.context.set_config(
        backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        [*backpressure_policy.ENABLED_BACKPRESSURE_POLICIES, ReadAhead],
    )
    return numbers.map(decode, num_cpus=decode_cpus)


def check_cursor(plan: Plan[Any], start: int | Cursor) -> int:
    """The row at which a feed of `plan` goes on; `ValueError`, saying why, if it cannot start at `start`."""
    if isinstance(start, Cursor):
        if start.fingerprint != plan.fingerprint:
            keys = dict.fromkeys((*start.origin, *plan.origin))
            changed = [key for key in keys if start.origin.get(key) != plan.origin.get(key)]
            changes = "; ".join(f"{key}: was {start.origin.get(key)}, is {plan.origin.get(key)}" for key in changed)
            raise ValueError(
                f"the cursor is of another plan ({start.fingerprint}, not {plan.fingerprint}): it would repeat or "
                f"lose samples; what changed: {changes or 'the planner itself'}. Put it back, or start anew"
            )
        start = start.rows
    if not 0 <= start <= len(plan):
        raise ValueError(f"cursor {start} is outside the plan's {len(plan)} rows: another plan made it")
    if start % plan.step_batches:
        raise ValueError(f"cursor {start} is inside an optimiser step of {plan.step_batches} rows")
    return start


class _Decode:
    """The map's function: a row's number to its collated arrays."""

    def __init__(self, collator: ray.ObjectRef, plan: ray.ObjectRef, start: int) -> None:
        self.collator, self.plan, self.start = collator, plan, start

    def __call__(self, number: dict[str, Any]) -> dict[str, Any]:
        plan: Plan[Any] = _fetched(self.plan)
        collator: Callable[[Row[Any]], LmBatch | ClapBatch] = _fetched(self.collator)
        return collator(plan.row(self.start + int(number["id"]))).to_row()


class Numbers(ray.data.Datasource):
    """The numbers 0 to n-1."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self.num_rows

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ray.data.ReadTask]:
        bounds = [self.num_rows * k // parallelism for k in range(parallelism + 1)]
        return [self._task(a, b) for a, b in itertools.pairwise(bounds) if a < b]

    def _task(self, first: int, stop: int) -> ray.data.ReadTask:
        size = stop - first
        metadata = BlockMetadata(num_rows=size, size_bytes=8 * size, input_files=None, exec_stats=None)
        return ray.data.ReadTask(lambda: [pa.table({"id": pa.array(range(first, stop), pa.int64())})], metadata)


class Pace(ExecutionCallback):
    """A pause in each round of Ray Data's scheduler, except while plan rows are read; longer where nothing happens.

    While the trainer is behind, nothing is running that the scheduler could wait for, and it spins: half a core on a
    small machine, a tenth with a pause of 20 ms. Rows take tenths of a second then, so a longer one costs nothing; if
    rows come quickly, each round sees a change and the pause stays short. The read yields one number a round, and if
    the trainer holds all but a fraction of the CPUs decoding waits for its end: with the pause, the first batch of 680
    rows came after 17 s, of 1800 after 43 s.
    """

    def __init__(self) -> None:
        self._seen, self._pause_s = 0, _PAUSES_S[0]

    def on_execution_step(self, executor: Any) -> None:
        operators = list(executor._topology)
        if any(op.num_active_tasks() for op in operators if op.name.startswith("Read")):
            return
        done = sum(op.metrics.num_tasks_finished + op.metrics.num_outputs_taken for op in operators)
        changed = done != self._seen or executor._consumer_idling()
        self._pause_s = _PAUSES_S[0] if changed else min(2 * self._pause_s, _PAUSES_S[1])
        self._seen = done
        time.sleep(self._pause_s)


class ReadAhead(backpressure_policy.BackpressurePolicy):
    """One more of Ray Data's rules of who may run.

    Its own rules count bytes, and numbers have next to none: a plan of a million rows would be read to its end at once,
    a kilobyte of the scheduler's memory a row.
    """

    @property
    def name(self) -> str:
        return "ReadAhead"

    def can_add_input(self, op: Any) -> bool:
        waiting = (self._topology[after].total_enqueued_input_blocks() for after in op.output_dependencies)
        return max(waiting, default=0) < _READ_ROWS


@functools.lru_cache(maxsize=8)
def _fetched(ref: ray.ObjectRef) -> Any:
    """An object of the store, kept in this process: a tokenizer takes longer to unpickle than a clip to decode.

    The plan's arrays stay where they are, in the memory that all processes of the machine share.
    """
    return ray.get(ref)


def data_config() -> DataConfig:
    """The `dataset_config` for a `TorchTrainer`: an order set on the dataset itself would be silently lost."""
    from ray.train import DataConfig  # which decoding has no need of

    return DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True))


def iter_batches(shard: ray.data.DataIterator, batch_type: type[BatchT], *, prefetch: int = 2) -> Iterator[BatchT]:
    """A rank's batches as torch tensors, in order; `prefetch` of them wait ready. The tensors are read-only."""
    for columns in shard.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=prefetch):
        yield batch_type.from_row({name: column[0] for name, column in columns.items()})
