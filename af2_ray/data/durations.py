"""Durations that a manifest leaves out: read from the files' headers once, in parallel, and kept beside the manifest.

A header costs a request, not a download, but a million of them are hours: so they are kept, as
`<manifest>.durations.json`, or in a folder of the run where the manifest's own place cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import cast

from af2_ray.audio.decode import AudioError, probe
from af2_ray.data.columns import SampleTable, without_duration
from af2_ray.data.names import name_fault
from af2_ray.data.samples import ItemT, Sample, measured_stretch, stretches_of
from af2_ray.storage.places import locate, write_text

logger = logging.getLogger(__name__)

_THREADS = 16  # waiting for headers, not computing


def fill_durations(
    items: Sequence[ItemT], manifest_uri: str, *, fallback: str | None = None
) -> tuple[Sequence[ItemT], dict[str, str]]:
    """Give items without a duration the one of their file, less their offset.

    Args:
        items: samples or caption sets of one manifest.
        manifest_uri: address of the manifest; the durations are kept beside it, as `<manifest>.durations.json`.
        fallback: folder for them where that place cannot be written.

    Returns:
        The items, and why a file's duration could not be read, by uri; its items stay without one, and
        `check_samples` sets them aside.
    """
    without = without_duration(items).tolist()
    if not without:
        return items, {}
    stretches = (stretch for place in without for stretch in stretches_of(items[place]))
    uris = list(dict.fromkeys(stretch.uri for stretch in stretches if not math.isfinite(stretch.duration_s)))
    caches = [f"{manifest_uri.rstrip('/')}.durations.json"]
    if fallback is not None:
        mark = hashlib.sha256(manifest_uri.encode()).hexdigest()[:12]
        caches.append(f"{fallback.rstrip('/')}/{mark}.durations.json")
    known = _load(caches)
    failures = {uri: reason for uri in uris if (reason := name_fault(uri))}  # not even looked at
    missing = [uri for uri in uris if uri not in known and uri not in failures]
    if missing:
        logger.info("reading the durations of %d files", len(missing))
        found, unread = read_durations(missing)
        known |= found
        failures |= unread
        _save(caches, known)
    if isinstance(items, SampleTable):
        return cast(Sequence[ItemT], items.measured(known)), failures
    filled = list(items)
    for place in without:
        item = filled[place]
        filled[place] = replace(item, duration_s=measured_stretch(item.stretch, known).duration_s)
        if isinstance(item, Sample) and item.more_audio:
            more = tuple(measured_stretch(stretch, known) for stretch in item.more_audio)
            filled[place] = replace(filled[place], more_audio=more)
    return filled, failures


def read_durations(uris: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Durations of files by their headers, and the reasons why others have none that can be read, by uri."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(uris, pool.map(_probed, uris), strict=True))
    unread = {uri: reason for uri, reason in found.items() if isinstance(reason, str)}
    return {uri: seconds for uri, seconds in found.items() if isinstance(seconds, float)}, unread


def _probed(uri: str) -> float | str:
    try:
        return probe(uri)
    except AudioError as error:
        return error.reason


def _load(caches: Sequence[str]) -> dict[str, float]:
    known: dict[str, float] = {}
    for cache in caches:
        fs, path = locate(cache)
        try:
            known |= {str(uri): float(seconds) for uri, seconds in json.loads(fs.cat_file(path)).items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("%s is not readable, durations are read anew: %s", cache, error)
    return known


def _save(caches: Sequence[str], known: dict[str, float]) -> None:
    """Write to the first place that can be written."""
    for cache in caches:
        try:
            write_text(cache, json.dumps(known))
            return
        except OSError as error:
            logger.info("%s cannot be written: %s", cache, error)
