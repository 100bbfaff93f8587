"""All of one model's text machinery in one place: tokenizer, template, special tokens, recommended defaults.

Built from a model card and the two files it names by content. Must never fetch anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

import msgspec

from holdfast.base.errors import InternalError
from holdfast.models.card import Artifact, ModelCard, PromptFiles
from holdfast.models.store import ArtifactStore
from holdfast.text.pipeline import TextAssembler
from holdfast.text.reasoning import ReasoningParser, ReasoningTags, detect_tags, opened_by_prompt
from holdfast.text.template import ChatTemplate
from holdfast.text.tokenizer import Tokenizer
from holdfast.text.tools import MARKERS, ToolFormat, ToolParser, detect_format

_decode_prompt_files = msgspec.msgpack.Decoder(PromptFiles).decode
encode_prompt_files = msgspec.msgpack.Encoder().encode
"""`PromptFiles` to the bytes that the card's ``prompt_files`` names."""

_SAMPLING_DEFAULTS = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k")


class TextModel:
    """What a frontend needs to turn messages into ids and ids into text, for one model."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer_json: bytes | Tokenizer,
        prompt_files: bytes | PromptFiles,
        *,
        now: Callable[[], datetime] | None = None,
    ):
        """Load it; about 0.1 s for 50,000 pieces, so do it off the event loop.

        Args:
            card: names the model, its end-of-sequence ids and sizes.
            tokenizer_json: content of the card's ``tokenizer``, or that tokenizer loaded already.
            prompt_files: content of the card's ``prompt_files``.
            now: wall clock for templates that print the date.

        Raises:
            InternalError: one of the files cannot be read.
        """
        self.card = card
        files = prompt_files if isinstance(prompt_files, PromptFiles) else _read_prompt_files(card, prompt_files)
        self.tokenizer = tokenizer_json if isinstance(tokenizer_json, Tokenizer) else Tokenizer(tokenizer_json)
        self.template = ChatTemplate(files.chat_template, files.bos_token, files.eos_token, now=now)
        self.eos_token_ids = card.eos_token_ids
        self.generation_config = files.generation_config
        self.default_sampling = _sampling_defaults(files.generation_config)
        """What the model's authors recommend, for requests that do not say: temperature, top_p, top_k, min_p,
        repetition_penalty; only those given."""
        self.tool_format: ToolFormat | None = detect_format(self.template.source)
        self.reasoning_tags: ReasoningTags | None = detect_tags(self.template.source)

    def warm(self) -> None:
        """Build the detokenizing tables of plain requests now (50 ms for 50,000 pieces), off the event loop."""
        if self.tokenizer.byte_level:
            self.tokenizer.tables()

    def assembler(
        self,
        *,
        prompt: str = "",
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special: bool = True,
        tool_format: ToolFormat | None = None,
        new_call_id: Callable[[], str] | None = None,
        stream_arguments: bool = True,
        reasoning: bool = False,
    ) -> TextAssembler:
        """Return the text side of one fresh choice.

        Args:
            prompt: the rendered prompt; its end says whether it opened a reasoning block.
            stops: stop strings.
            include_stop: see `TextAssembler`.
            min_tokens: see `TextAssembler`.
            skip_special: whether special tokens are left out of the text.
            tool_format: parse tool calls of this format (usually `tool_format` of this model, if tools were
                given); needs ``new_call_id``.
            new_call_id: draws ids for tool calls.
            stream_arguments: see `ToolParser`; false for answers in one piece.
            reasoning: split off reasoning, if this model thinks in tags.
        """
        tags = self.reasoning_tags if reasoning else None
        tools = None
        keep: Iterable[str] = ()
        if tool_format is not None and new_call_id is not None:
            tools = ToolParser(tool_format, new_call_id, stream_arguments=stream_arguments)
            keep = MARKERS[tool_format]
        thoughts = None
        if tags is not None:
            thoughts = ReasoningParser(tags, starts_inside=opened_by_prompt(prompt, tags))
            keep = (*keep, tags.open, tags.close)
        return TextAssembler(
            self.tokenizer.detokenizer(skip_special, keep),
            stops=stops,
            include_stop=include_stop,
            min_tokens=min_tokens,
            reasoning=thoughts,
            tools=tools,
        )


def missing(card: ModelCard, store: ArtifactStore) -> list[Artifact]:
    """Return the files of a card that have to be fetched before `load_text` can work."""
    return [artifact for artifact in (card.tokenizer, card.prompt_files) if store.get(artifact) is None]


def load_text(
    card: ModelCard,
    store: ArtifactStore,
    *,
    like: TextModel | None = None,
    now: Callable[[], datetime] | None = None,
) -> TextModel | None:
    """Return the card's text machinery, or None when a file is not in the store (see `missing`).

    Args:
        card: the model.
        store: holds the files.
        like: a loaded model; its tokenizer is shared when it is the same file.
        now: see `TextModel`.
    """
    prompt_files = store.get(card.prompt_files)
    if prompt_files is None:
        return None
    if like is not None and like.card.tokenizer == card.tokenizer:
        return TextModel(card, like.tokenizer, prompt_files, now=now)
    tokenizer_json = store.get(card.tokenizer)
    return None if tokenizer_json is None else TextModel(card, tokenizer_json, prompt_files, now=now)


def _read_prompt_files(card: ModelCard, data: bytes) -> PromptFiles:
    try:
        return _decode_prompt_files(data)
    except msgspec.DecodeError as error:
        raise InternalError(
            f"The prompt files of model {card.name!r} ({card.prompt_files.sha256[:12]}) cannot be read: {error}. "
            "Frontend and worker may be of incompatible versions."
        ) from error


def _sampling_defaults(config: dict[str, float | int | bool | str]) -> dict[str, float | int]:
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    found: dict[str, float | int] = {}
    for name in _SAMPLING_DEFAULTS:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = int(value) if name == "top_k" else value
    return found
