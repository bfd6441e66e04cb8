"""What the API answers, in OpenAI's shapes."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_serializer

from af2_ray.engine.request import FinishReason, TokenLogprob


class PromptDetails(BaseModel):
    """What the prompt held besides words."""

    audio_seconds: float


class Usage(BaseModel):
    """Text tokens read and written, and the seconds of audio heard (audio is not counted in tokens)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, audio_s: float) -> Usage:
        """Add it up."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptDetails(audio_seconds=round(audio_s, 3)),
        )


class ReplyMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class TopLogprob(BaseModel):
    """A token that was likely at a place, with its log probability and the bytes it stands for."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: str, logprob: float) -> TopLogprob:
        """With the bytes of the token's text."""
        return cls(token=token, logprob=max(logprob, -9999.0), bytes=list(token.encode()))


class PlaceLogprob(TopLogprob):
    """The token that was chosen, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log probabilities of the tokens of an answer, before any temperature."""

    content: list[PlaceLogprob]

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob]) -> Logprobs | None:
        """None where none were asked for."""
        places = [
            PlaceLogprob(
                **TopLogprob.of(place.token, place.logprob).model_dump(),
                top_logprobs=[TopLogprob.of(token, value) for token, value in place.top],
            )
            for place in tokens
        ]
        return cls(content=places) if places else None


class Choice(BaseModel):
    """One answer of a completion."""

    index: int = 0
    message: ReplyMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The whole answer at once."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage
    truncated: bool = Field(False, description="whether only the beginning of a recording was heard, as asked for")


class Delta(BaseModel):
    """What a chunk adds to the answer; what it does not add is left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _given(self) -> dict[str, str]:
        return {key: value for key, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One server-sent event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None

    def event(self) -> str:
        """The chunk as a server-sent event."""
        return f"data: {self.model_dump_json(exclude={'usage'} if self.usage is None else None)}\n\n"


class EmbeddingUsage(BaseModel):
    """Text tokens read, and the seconds of audio heard."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt_tokens: int, audio_s: float) -> EmbeddingUsage:
        """Nothing is written, so the total is what was read."""
        details = PromptDetails(audio_seconds=round(audio_s, 3))
        return cls(prompt_tokens=prompt_tokens, total_tokens=prompt_tokens, prompt_tokens_details=details)


class Embedding(BaseModel):
    """The unit vector of one input: numbers, or base64 of their little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """`POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage

    @classmethod
    def of(cls, vectors: NDArray[np.float32], *, as_base64: bool, model: str, usage: EmbeddingUsage) -> EmbeddingList:
        """Of vectors [N, J]."""
        coded = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_base64 else v.tolist() for v in vectors]
        data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(coded)]
        return cls(data=data, model=model, usage=usage)


class LabelScore(BaseModel):
    """A label and its probability among those asked for."""

    label: str
    score: float


class LabelList(BaseModel):
    """`POST /v1/audio/labels`, the likeliest first."""

    object: Literal["list"] = "list"
    data: list[LabelScore]
    model: str
    usage: EmbeddingUsage


class DeletedAudio(BaseModel):
    """`DELETE /v1/audio/SHA256`: nothing is kept of the recording now, whether or not anything was."""

    id: str
    object: Literal["audio.deleted"] = "audio.deleted"
    deleted: bool = True


class ModelCard(BaseModel):
    """One model of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "af2_ray"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
