"""Whether prompts and answers may be written to the logs; set once per process, off unless somebody asked for it.

Must never hold what a request said.
"""

from __future__ import annotations

CHARACTERS = 16_384
"""Most characters of one text in one line; of a longer one its end is shown, which is what the model saw last."""


class Content:
    """``on`` is the setting ``DYN_LOG_CONTENT`` of this process."""

    def __init__(self) -> None:
        self.on = False


CONTENT = Content()


def shown(text: str) -> str:
    """Return a text as it is logged: whole, or its end with the number of characters that are left out."""
    cut = len(text) - CHARACTERS
    return text if cut <= 0 else f"({cut} characters left out) {text[cut:]}"
