"""Clips and samples that are set aside: counted, listed with a reason, an error where they are too many.

The run's `quarantine.jsonl` has a JSON line for each. The trade-off: a run survives some bad files without a
substitute ever taking their place, and a wrong path or a lost bucket still ends it soon instead of training on nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from af2_ray.storage.files import append_lines, read_rows
from af2_ray.storage.places import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """One clip or sample that was left out: `row` is the plan's row (-1: before planning, from the manifest)."""

    uri: str
    reason: str
    offset_s: float = 0.0
    detail: str = ""
    row: int = -1
    num_samples: int = 1


class TooManyBad(RuntimeError):
    """More was set aside than the recipe allows."""


class Quarantine:
    """The list of a run, kept by one process (the controller or rank 0).

    Args:
        path: the file of JSON lines, on this machine; one that exists is continued, so that a restarted run neither
            forgets nor lists twice.
        name: name in messages; none: the path.
        max_bad_share: largest share of items set aside.
        min_items: number of items from which the share is judged (one bad file of three is no verdict).
    """

    def __init__(
        self, path: str, max_bad_share: float = 0.02, *, min_items: int = 200, name: str | None = None
    ) -> None:
        self.path, self.max_bad_share, self.min_items = path, max_bad_share, min_items
        self._name = name or path
        self.num_items = self.num_bad = 0
        self.reasons: Counter[str] = Counter()
        self._known = {json.dumps(row) for row in read_rows(Path(path))}

    @property
    def bad_share(self) -> float:
        """Share of the items seen by this process that were set aside."""
        return self.num_bad / max(1, self.num_items)

    def add(self, failures: Sequence[Failure | Mapping[str, Any]], num_items: int) -> None:
        """Count `num_items` clips (or samples) of which `failures` (or their dicts) were set aside, and list those.

        Raises:
            TooManyBad: the share is above `max_bad_share`; the message names the reasons and the list.
        """
        listed = [failure if isinstance(failure, Failure) else Failure(**failure) for failure in failures]
        self.num_items += num_items
        self.num_bad += len(listed)
        self.reasons.update(failure.reason for failure in listed)
        lines = [json.dumps(asdict(failure)) for failure in listed]
        fresh = [line for line in dict.fromkeys(lines) if line not in self._known]
        if fresh:
            log.warning("set aside: %s", "; ".join(f"{shown(f.uri)}: {f.reason}" for f in listed[:3]))
            append_lines(Path(self.path), fresh)
            self._known.update(fresh)
        if self.num_items >= self.min_items and self.bad_share > self.max_bad_share:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            raise TooManyBad(
                f"{self.num_bad} of {self.num_items} items were set aside ({self.bad_share:.1%}, allowed "
                f"{self.max_bad_share:.1%}: faults.max_bad_share): {reasons}; listed in {self._name}"
            )
