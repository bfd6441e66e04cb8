"""Tokens to text as they come, ending at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)


class TextStream:
    """Decodes token by token: half characters and what may become a stop string are held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._cutter = StopCutter(stops)
        self._ids: list[int] = []
        self._begin = self._read = 0  # the last piece read, which may change how the next is spaced, and its end
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was written; it and all behind it are left out."""
        return self._cutter.stopped

    def add(self, token: int) -> str:
        """The text that is safe to pass on after one more token."""
        self._ids.append(token)
        written = self._decode(self._begin, len(self._ids))
        if written.endswith(_HALF):
            return ""
        return self._take(written)

    def end(self) -> str:
        """What was held back."""
        piece = self._take(self._decode(self._begin, len(self._ids)))
        rest = self._cutter.rest()
        self.text += rest
        return piece + rest

    def _take(self, written: str) -> str:
        before = self._decode(self._begin, self._read)
        self._begin, self._read = self._read, len(self._ids)
        piece = self._cutter.feed(written[len(before) :])
        self.text += piece
        return piece

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)) if end > begin else ""


class StopCutter:
    """Passes text on up to the first stop string, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that is safe to pass on now."""
        if self.stopped:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
