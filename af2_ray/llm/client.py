"""A large language model behind any OpenAI-compatible endpoint: replies in JSON, tried again with a reason, and priced.

A model sometimes writes what was not asked for, and an endpoint is sometimes busy. The client of `openai` asks a busy
endpoint (429, 5xx) the same again, after the time that its Retry-After says (`max_retries`); a reply that does not hold
is handed back to the model with the reason, as often as the caller pays for. Each such try costs the whole prompt once
more, and the last reply with its reason.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

TIMEOUT_S = 60.0  # of a request
Spent = Counter[str]  # `requests`, `prompt_tokens`, `completion_tokens`; `cached`: replies that were there already


class NoReply(ValueError):
    """No usable reply: the endpoint failed, or no try held. The message says which, with the last reason."""


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, and what its tokens cost. Its key is in OPENAI_API_KEY; a local server needs none.

    Attributes:
        model: its name there.
        base_url: its address, up to `/v1`; none: OpenAI's.
        price_prompt, price_completion: price of a million tokens, in any one currency.
        max_retries: number of times that a busy endpoint is asked again.
    """

    model: str
    base_url: str | None = None
    price_prompt: float = 0.0
    price_completion: float = 0.0
    max_retries: int = 5

    def cost(self, spent: Spent) -> float:
        """What these tokens cost, in the currency of the prices."""
        return (spent["prompt_tokens"] * self.price_prompt + spent["completion_tokens"] * self.price_completion) / 1e6


@dataclass
class Client:
    """Asks the model; `spent` counts what that has cost."""

    endpoint: Endpoint
    spent: Spent = field(default_factory=Spent)

    def reply(self, messages: Sequence[Any], key: str, schema: dict[str, Any]) -> Any:
        """The value of one key of the model's reply, a JSON object; None where the reply is none with that key.

        Args:
            messages: the conversation so far, each with `role` (system, user or assistant) and `content`.
            key: name of the key, and of the schema.
            schema: JSON schema of the value, which the endpoint is asked to keep to. Not each does: check the value.

        Raises:
            NoReply: the endpoint refused, or was busy to the end.
        """
        import openai

        whole = {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}
        form: Any = {"type": "json_schema", "json_schema": {"name": key, "strict": True, "schema": whole}}
        try:
            made = self._openai.chat.completions.create(
                model=self.endpoint.model, messages=messages, response_format=form
            )
        except openai.OpenAIError as error:
            raise NoReply(f"the endpoint failed: {error}") from error
        self.spent["requests"] += 1
        if made.usage:
            self.spent["prompt_tokens"] += made.usage.prompt_tokens
            self.spent["completion_tokens"] += made.usage.completion_tokens
        try:
            return json.loads(made.choices[0].message.content or "")[key]
        except (ValueError, KeyError, TypeError, IndexError):
            return None

    def reply_that_holds(
        self,
        messages: Sequence[Any],
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
        again: list[Any] = []
        for _ in range(attempts):
            value = self.reply([*messages, *again], key, schema)
            if not (reason := fault(value)):
                return value
            again = [
                {"role": "assistant", "content": json.dumps({key: value})},
                {"role": "user", "content": f"That does not do: {reason}. Write all of it again."},
            ]
        raise NoReply(reason)

    @cached_property
    def _openai(self) -> openai.OpenAI:
        import openai

        return openai.OpenAI(
            base_url=self.endpoint.base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=TIMEOUT_S,
            max_retries=self.endpoint.max_retries,
        )
