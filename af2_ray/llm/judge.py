"""A verdict on each of several texts by a large language model.

All texts go into one request: a judge of twelve texts costs one prompt in place of twelve. A model that is asked so
answers a little less sharply than one that sees each text alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray.llm.client import Client


def judge(client: Client, task: str, given: str, texts: Sequence[str], verdicts: Sequence[str]) -> list[str]:
    """One of `verdicts` for each text, in order; an empty list where the reply is not complete.

    Args:
        client: the model that judges.
        task: instruction that says what is to be judged, and what each verdict means.
        given: text that all are judged by.
        texts: sentences that are judged, numbered from 1.
        verdicts: words that the model may choose from.

    Raises:
        NoReply: the endpoint failed.
    """
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    messages = [{"role": "system", "content": task}, {"role": "user", "content": f"{given}\nTexts:\n{listed}"}]
    schema = {"type": "array", "items": {"enum": list(verdicts)}, "minItems": len(texts), "maxItems": len(texts)}
    found = client.reply(messages, "verdicts", schema)
    return found if isinstance(found, list) and len(found) == len(texts) else []
