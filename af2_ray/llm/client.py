"""A large language model behind any OpenAI-compatible endpoint: replies in JSON, tried again with a reason, and priced.

A model sometimes writes what was not asked for, and an endpoint is sometimes busy. The client of `openai` asks a busy
endpoint (429, 5xx) the same again, after the time that its Retry-After says (`max_retries`); a reply that does not hold
is handed back to the model with the reason, as often as the caller pays for. Each such try costs the whole prompt once
more, and the last reply with its reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

Message = dict[str, str]


class NoReply(ValueError):
    """No usable reply: the endpoint failed, or no try held. The message says which, with the last reason."""


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, and what its tokens cost.

    Attributes:
        model: its name there.
        base_url: its address, up to `/v1`; none: OpenAI's.
        key_variable: environment variable with the key; a local server needs none.
        price_prompt, price_completion: price of a million tokens, in any one currency.
        timeout_s: seconds that a request may take.
        max_retries: number of times that a busy endpoint is asked again.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    price_prompt: float = 0.0
    price_completion: float = 0.0
    timeout_s: float = 60.0
    max_retries: int = 5


@dataclass
class Spent:
    """What requests have cost, and how many replies were there already (`cached`)."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Spent) -> None:
        """Count what others have spent, too."""
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)

    def taken(self) -> Spent:
        """What was spent since this was last called."""
        before = replace(self)
        vars(self).update(vars(Spent()))
        return before

    def cost(self, endpoint: Endpoint) -> float:
        """In the currency of the endpoint's prices."""
        tokens = self.prompt_tokens * endpoint.price_prompt + self.completion_tokens * endpoint.price_completion
        return tokens / 1e6


@dataclass
class Client:
    """Asks the model; `spent` counts what that has cost."""

    endpoint: Endpoint
    spent: Spent = field(default_factory=Spent)

    def reply(self, messages: Sequence[Message], key: str, schema: dict[str, Any]) -> Any:
        """The value of one key of the model's reply, a JSON object; None where the reply is none with that key.

        Args:
            messages: the conversation so far (`message`).
            key: name of the key, and of the schema.
            schema: JSON schema of the value, which the endpoint is asked to keep to. Not each does: check the value.

        Raises:
            NoReply: the endpoint refused, or was busy to the end.
        """
        import openai

        whole = {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}
        form: Any = {"type": "json_schema", "json_schema": {"name": key, "strict": True, "schema": whole}}
        conversation: Any = list(messages)
        try:
            made = self._openai.chat.completions.create(
                model=self.endpoint.model, messages=conversation, response_format=form
            )
        except openai.OpenAIError as error:
            raise NoReply(f"the endpoint failed: {error}") from error
        self.spent.requests += 1
        if made.usage:
            self.spent.prompt_tokens += made.usage.prompt_tokens
            self.spent.completion_tokens += made.usage.completion_tokens
        try:
            return json.loads(made.choices[0].message.content or "")[key]
        except (ValueError, KeyError, TypeError, IndexError):
            return None

    def reply_that_holds(
        self,
        messages: Sequence[Message],
        key: str,
        schema: dict[str, Any],
        fault: Callable[[Any], str],
        attempts: int,
    ) -> Any:
        """As `reply`, until `fault` finds nothing; what it finds is said to the model, which may try again.

        Args:
            messages, key, schema: the same as for `reply`.
            fault: function that says what is wrong with a value, in words for the model; empty: nothing.
            attempts: number of times that the model may try.

        Raises:
            NoReply: the last try has a fault, too, or the endpoint failed.
        """
        again: list[Message] = []
        reason = ""
        for _ in range(attempts):
            value = self.reply([*messages, *again], key, schema)
            if not (reason := fault(value)):
                return value
            again = [
                message("assistant", json.dumps({key: value})),
                message("user", f"That does not do: {reason}. Write all of it again."),
            ]
        raise NoReply(reason)

    @cached_property
    def _openai(self) -> openai.OpenAI:
        import openai

        return openai.OpenAI(
            base_url=self.endpoint.base_url,
            api_key=os.environ.get(self.endpoint.key_variable, "none"),
            timeout=self.endpoint.timeout_s,
            max_retries=self.endpoint.max_retries,
        )


def message(role: str, content: str) -> Message:
    """One message of a conversation, by `system`, `user` or `assistant`."""
    return {"role": role, "content": content}
