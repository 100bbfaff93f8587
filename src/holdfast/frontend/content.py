"""Prompts and answers in the log, for those who have asked for it (``--log-content``).

The only place that writes what a request said. Must never be called while `telemetry.content.CONTENT` is off.
"""

from __future__ import annotations

import logging

from holdfast.frontend.prepare import Prepared, Prompt
from holdfast.requests.request import Request
from holdfast.telemetry.content import CHARACTERS, shown
from holdfast.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_TOKENS = CHARACTERS
"""Most ids that are turned back into text: a token has a character at least, with few exceptions."""


def log_content(prepared: Prepared, request: Request) -> None:
    """Log what one request asked and was answered, a line per choice; after its end."""
    tokenizer = prepared.served.text.tokenizer
    for stream in request.streams:
        prompt = prepared.prompts[stream.plan.choice // prepared.spec.n]
        answer = tokenizer.decode(stream.generated[-_TOKENS:], skip_special=False)
        facts = {"choice": stream.plan.choice, "prompt": shown(_text(prompt, tokenizer)), "answer": shown(answer)}
        log.info("content of choice %d (%d tokens)", stream.plan.choice, len(stream.generated), extra=facts)


def _text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return prompt.text or tokenizer.decode(prompt.ids[-_TOKENS:], skip_special=False)
