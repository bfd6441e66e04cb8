"""How many replicas of the model there should be: by the audio they have to hear, not by the number of requests alone.

A question about five minutes is thirty times the encoder's work of one about ten seconds, so requests are a poor
measure. Serve applies the recipe's bounds and delays to what this policy wants.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext


class ByWindows:
    """Enough replicas for the windows and the requests that are queued or being answered.

    Args:
        windows: 10 s windows a replica should have at most.
        requests: requests a replica should have at most (those without audio have no windows).
    """

    def __init__(self, windows: float, requests: float) -> None:
        self._windows, self._requests = windows, requests

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number wanted, and no state of its own."""
        by_replica = (context.aggregated_metrics or {}).get("windows", {})
        for_windows = sum(by_replica.values()) / self._windows
        for_requests = context.total_num_requests / self._requests
        return math.ceil(max(for_windows, for_requests)), {}
