"""What a module makes of its weights alone, made once while nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KeepsConstants(nn.Module):
    """A module that keeps what it has made of its weights; no part of its state, and empty after `train` and `eval`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def keep(self, key: Any, weights: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """What `make` gives of `weights`: under the same key it is kept, unless gradients are on or the module trains.

        It is made anew when a weight is replaced or written to, and after `train`, `eval`, `to` and the like; a write
        through a weight's `.data` is seen at the next of those.
        """
        if torch.is_grad_enabled() or self.training or any(weight.is_inference() for weight in weights):
            return make()  # weights of inference mode do not tell when they are written to
        state = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
        kept = self._kept.get(key)  # which another thread may drop: parts of a model share modules (`parts`)
        if kept is None or kept[0] != state:
            self._kept[key] = kept = state, make()
        return kept[1]

    def train(self, mode: bool = True) -> Any:
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()
        return super()._apply(*args, **kwargs)
