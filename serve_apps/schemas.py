"""OpenAI's chat completions as far as a model that hears and writes text can honour them.

Keys we do not know are ignored, because every client version sends a few more. Keys we do know are strict in type, and
a value that would silently change the answer's meaning (tools, JSON mode) is refused with what to do instead:
better a 400 at once than an answer that ignored half of the question.
"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from af2_ray.text import Message as Said

MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 256  # texts and recordings of one request for embeddings
MAX_PARTS = 256  # of one message
MAX_LABEL_CHARS = 1024
MAX_NAME_CHARS = 256
MAX_WIDE_BYTES = 2**18  # of a string that is not ASCII alone; a text that may be asked has fewer
MAX_VALUES = 2**16  # in one body: a value of two bytes becomes objects of a kilobyte before it can be refused

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
"""Keys this server cannot honour, with the values that ask for nothing (besides null)."""


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be answered, in the form that OpenAI's clients expect.

    Attributes:
        status: the HTTP status this stands for; 4xx is the caller's to mend, 5xx ours.
        message: one sentence that says what to do.
        param: the key at fault, dotted.
        code: a short stable word for programs.
        retry_after_s: seconds to wait before another try, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status in _KINDS:
            kind = _KINDS[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_audio(message: str) -> ApiError:
    """The error of a recording that cannot be used."""
    return ApiError(400, message, code="invalid_audio", param="messages")


# --- Requests ----------------------------------------------------------------------------------------------------


class _Incoming(BaseModel):
    """Strict in the types it knows, deaf to the keys it does not."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Incoming):
    """Words of a message."""

    type: Literal["text"]
    text: str


class InputAudio(_Incoming):
    """A whole audio file: base64 of its bytes. The content decides how it is read, `format` only names it."""

    data: str = Field(repr=False)
    format: Literal["wav", "flac", "ogg", "mp3"]


class AudioPart(_Incoming):
    """A recording of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(_Incoming):
    """Where a whole audio file is: `data:` with base64; `https:` and `s3:` as far as this server's lists allow."""

    url: str = Field(max_length=2**27, repr=False)


class AudioUrlPart(_Incoming):
    """A recording by its address."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Content = Annotated[TextPart | AudioPart | AudioUrlPart, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    """Content with its strings as parts; what is no content is left for the schema to refuse."""
    items = [content] if isinstance(content, str) else content
    if not isinstance(items, list):
        return items
    if len(items) > MAX_PARTS:
        raise ValueError(f"{len(items)} parts: send at most {MAX_PARTS}")
    return [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]


def _or_text(schema: dict[str, Any]) -> None:
    """In the OpenAPI document: a string stands for one part of text, alone and among parts."""
    parts = {key: schema.pop(key) for key in ("type", "items", "minItems", "maxItems") if key in schema}
    parts["items"] = {"anyOf": [{"type": "string"}, parts["items"]]}
    schema["anyOf"] = [{"type": "string"}, parts]


def audio_of(part: Content) -> InputAudio | AudioUrl | None:
    """The recording of a part, if it is one."""
    if isinstance(part, TextPart):
        return None
    return part.input_audio if isinstance(part, AudioPart) else part.audio_url


class Message(_Incoming):
    """One message: a string, or parts of text and audio."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Content] = Field(json_schema_extra=_or_text)

    @field_validator("content", mode="before")
    @classmethod
    def _string_is_one_part(cls, content: Any) -> Any:
        return _parts(content)

    def text(self) -> str:
        """The words of this message, parts on lines of their own."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart)).strip()

    def audios(self) -> list[InputAudio | AudioUrl]:
        """The recordings of this message, in order."""
        return [audio for part in self.content if (audio := audio_of(part))]


def _role(message: Message) -> Literal["system", "user", "assistant"]:
    return "system" if message.role == "developer" else message.role


class StreamOptions(_Incoming):
    """`include_usage`: one more chunk at the end, with the counts."""

    include_usage: bool = False


class ChatRequest(_Incoming):
    """`POST /v1/chat/completions`. Without a temperature the answer is greedy."""

    model: str = Field(max_length=MAX_NAME_CHARS)
    messages: list[Message] = Field(min_length=1, max_length=64)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=8)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_audio: bool | None = Field(None, description="whether long audio is cut (not OpenAI's)")

    @model_validator(mode="before")
    @classmethod
    def _nothing_ignored(cls, raw: Any) -> Any:
        """Refuse what would change the answer's meaning and is not supported."""
        if isinstance(raw, dict):
            for key, harmless in _NO_EFFECT.items():
                value = raw.get(key)
                if value is not None and value not in harmless:
                    wanted = f"leave it out or send {harmless[0]!r}" if harmless else "leave it out"
                    raise ValueError(f"{key!r} is not supported by this server; {wanted}")
        return raw

    @field_validator("stop")
    @classmethod
    def _few_real_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(0 < len(text) <= 256 for text in stops):
            raise ValueError("give at most 4 stop strings of 1 to 256 characters")
        return stop

    @model_validator(mode="after")
    def _asks_something(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError(f"the last message must be the user's, got role {self.messages[-1].role!r}")
        if not self.text():
            raise ValueError("the messages have no text: add a {'type': 'text', 'text': ...} part with the question")
        if any(message.audios() for message in self.messages if message.role != "user"):
            raise ValueError("only user messages may carry recordings")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def text(self) -> str:
        """All words of all messages."""
        return "\n".join(text for message in self.messages if (text := message.text()))

    def conversation(self) -> tuple[Said, ...]:
        """The messages as the model's chat template gets them; what one role says in a row is one message."""
        said: list[Said] = []
        for role, group in groupby(self.messages, _role):
            messages = list(group)
            words = "\n".join(text for message in messages if (text := message.text()))
            said.append(Said(role, words, sum(len(message.audios()) for message in messages)))
        return tuple(said)

    def audios(self) -> list[InputAudio | AudioUrl]:
        """All recordings of all messages, in order."""
        return [audio for message in self.messages for audio in message.audios()]

    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class EmbeddingRequest(_Incoming):
    """`POST /v1/embeddings`: strings as OpenAI has them, and recordings as the content parts of a chat."""

    model: str = Field(max_length=MAX_NAME_CHARS)
    input: list[Content] = Field(min_length=1, max_length=MAX_INPUTS, json_schema_extra=_or_text)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _strings_are_parts(cls, given: Any) -> Any:
        items = given if isinstance(given, list) else [given]
        if any(isinstance(item, int | list) for item in items):
            raise ValueError("token ids are not taken: send the text itself")
        return _parts(items)

    @field_validator("dimensions")
    @classmethod
    def _all_of_them(cls, dimensions: int | None) -> int | None:
        if dimensions is not None:
            raise ValueError("the vectors of this model are not shortened: leave it out")
        return dimensions


class LabelRequest(_Incoming):
    """`POST /v1/audio/labels`: how well each label fits a recording; names as in Hugging Face's zero-shot task."""

    model: str = Field(max_length=MAX_NAME_CHARS)
    input: Annotated[AudioPart | AudioUrlPart, Field(discriminator="type")]
    candidate_labels: list[Annotated[str, Field(max_length=MAX_LABEL_CHARS)]] = Field(
        min_length=1, max_length=MAX_INPUTS
    )
    hypothesis_template: str = Field("This is a sound of {}.", max_length=MAX_LABEL_CHARS)

    @field_validator("hypothesis_template")
    @classmethod
    def _one_place(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("it needs one {} where the label goes")
        return template

    def texts(self) -> list[str]:
        """What is compared with the recording, one for each label."""
        return [self.hypothesis_template.replace("{}", label) for label in self.candidate_labels]


RequestT = TypeVar("RequestT", bound=BaseModel)


def _check_wide(body: bytes | bytearray) -> None:
    """`ApiError` 400 for a long string with a letter beyond ASCII: one makes Python's string four times its bytes."""
    if body.isascii() and b"\\u" not in body:
        return
    start = place = 0
    while place <= len(body):
        end = body.find(b'"', place)
        end = len(body) if end < 0 else end
        piece = body[place:end]
        place = end + 1
        if end < len(body) and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            continue  # a mark of the string's own
        if end - start > MAX_WIDE_BYTES and not (body[start:end].isascii() and body.find(b"\\u", start, end) < 0):
            message = f"a text of more than {MAX_WIDE_BYTES} bytes, or a recording that is not base64: shorten it"
            raise ApiError(400, message, code="invalid_request")
        start = place


def parse_request(body: bytes | bytearray, kind: type[RequestT]) -> RequestT:
    """Read a request body; `ApiError` 400 names the first key at fault.

    What it costs is bounded by the body's bytes: before anything is built, the marks between values are counted, those
    within strings too. A recording has none of them, and a text that may be asked has fewer.
    """
    if sum(body.count(mark) for mark in b",[{") > MAX_VALUES or body.count(b'"') > 4 * MAX_VALUES:
        message = f"the body has more than {MAX_VALUES} values (commas and brackets, those in texts too): send less"
        raise ApiError(400, message, code="too_many_values")
    _check_wide(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part)[:40] for part in first["loc"])[:120] or None
    message = first["msg"].removeprefix("Value error, ")[:200]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {message}", code="invalid_json")
    if first["type"] == "union_tag_invalid":
        message = "this server takes content parts of type 'text', 'input_audio' and 'audio_url'"
    raise ApiError(400, f"{param}: {message}" if param else message, code="invalid_request", param=param)
