"""The recordings of a request as the engine's clips: those that the model has heard go by their keys alone.

A key is the SHA-256 of a file's bytes. Where callers have API keys it is salted with the caller's own (unless
`serve.share_audio` says otherwise): how fast an answer comes shows whether a recording was heard before, and nobody
shall learn that of another's. The price: a recording that two of them send is encoded twice.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from af2_ray.audio.windows import num_windows_for
from af2_ray.engine.request import Clip
from serve_apps.decode_pool import Read
from serve_apps.keys import ANYONE

_MOST = 4096  # recordings that are known by their keys


class Clips:
    """Makes clips.

    Args:
        read: function that decodes a recording (`DecodePool.read`).
        max_audio_s: seconds of audio that a request may bring.
    """

    def __init__(self, read: Read, max_audio_s: float) -> None:
        self._read, self._max_audio_s = read, max_audio_s
        self._heard: OrderedDict[tuple[str, str], float] = OrderedDict()  # seconds, by model and key

    async def of(
        self,
        files: Sequence[bytes],
        *,
        model: str = "",
        salt: bytes = b"",
        owner: bytes = ANYONE,
        truncate: bool = False,
        anew: bool = False,
    ) -> tuple[list[Clip], bool]:
        """Clips of a request's recordings, which share its seconds; whether one was cut.

        Args:
            files: bytes of the recordings, in order.
            model: name of the model that hears them; without one all are decoded.
            salt: secret of the caller.
            owner: caller, whose decoding others do not wait for.
            truncate: whether what is too long is cut, or refused.
            anew: whether recordings are decoded that the model has heard, too: it has forgotten them.

        Raises:
            ApiError: 400 audio that cannot be used, 413 too many seconds of it.
        """
        clips: list[Clip] = []
        truncated = False
        for index, data in enumerate(files):
            left_s = self._max_audio_s - sum(clip.duration_s for clip in clips)
            key = clip_key((await asyncio.to_thread(hashlib.sha256, data)).digest(), salt)
            heard_s = None if anew else self._heard.get((model, key))
            if heard_s is not None and heard_s <= left_s:
                clips.append(Clip(key, num_windows_for(heard_s), None, heard_s))
                continue
            found = await self._read(data, f"audio {index + 1}", left_s, truncate, owner)
            truncated |= found.is_cut
            clips.append(Clip.of(found.windows, f"{key}:{left_s:g}" if found.is_cut else key, found.duration_s))
        return clips, truncated

    def keep(self, model: str, clips: Sequence[Clip]) -> None:
        """Know clips that the model has heard."""
        for clip in clips:
            self._heard[model, clip.key] = clip.duration_s
            self._heard.move_to_end((model, clip.key))
        while len(self._heard) > _MOST:
            self._heard.popitem(last=False)

    def forget(self, key: str) -> None:
        """Know a recording no more, nor its beginnings."""
        for model, kept in list(self._heard):
            if kept.partition(":")[0] == key:
                del self._heard[model, kept]


def clip_key(digest: bytes, salt: bytes = b"") -> str:
    """The key of a recording, by the SHA-256 of its bytes."""
    return (hashlib.sha256(salt + digest).digest() if salt else digest).hex()
