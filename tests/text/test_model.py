"""A card and its two files become a tokenizer, a template, and assemblers for choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.base.errors import InternalError
from holdfast.models.card import ModelCard, PromptFiles, artifact_of
from holdfast.models.store import ArtifactStore
from holdfast.text.deltas import ContentDelta, ReasoningDelta, ToolCallDelta
from holdfast.text.model import TextModel, encode_prompt_files, load_text, missing

from .conftest import small_json

FILES = PromptFiles(
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}<think>",
    "<|im_start|>",
    "<|im_end|>",
    {"temperature": 0.6, "top_k": 20, "top_p": "x", "do_sample": True, "max_length": 5},
)


def card_of(tokenizer: bytes, prompt_files: bytes) -> ModelCard:
    return ModelCard("m", artifact_of(tokenizer), artifact_of(prompt_files), 128, (2,), 702, 16)


def test_loads_from_a_store_once_it_has_the_files(tmp_path: Path) -> None:
    tokenizer, files = small_json(), encode_prompt_files(FILES)
    card, store = card_of(tokenizer, files), ArtifactStore(tmp_path / "cache")
    assert missing(card, store) == [card.tokenizer, card.prompt_files]
    assert load_text(card, store) is None
    store.put(files)
    assert load_text(card, store) is None
    assert missing(card, store) == [card.tokenizer]
    store.put(tokenizer)
    model = load_text(card, store)
    assert model is not None
    assert missing(card, store) == []
    assert model.template.render([{"role": "user", "content": "Hi"}]) == "<|im_start|>Hi<|im_end|><think>"
    assert model.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert model.eos_token_ids == (2,)
    again = load_text(card, store, like=model)
    assert again is not None
    assert again.tokenizer is model.tokenizer


def test_greedy_models_and_broken_files() -> None:
    tokenizer = small_json()
    greedy = encode_prompt_files(PromptFiles("x", generation_config={"do_sample": False, "temperature": 0.7}))
    assert TextModel(card_of(tokenizer, greedy), tokenizer, greedy).default_sampling == {"temperature": 0.0}
    with pytest.raises(InternalError, match="prompt files of model 'm'"):
        TextModel(card_of(tokenizer, b"\x00"), tokenizer, b"\x00")


def test_assembler_shows_markers_that_are_special_tokens() -> None:
    tokenizer = small_json()
    model = TextModel(card_of(tokenizer, b""), tokenizer, PromptFiles("<|python_tag|>"))
    model.warm()
    assert model.tool_format == "llama3_json"
    ids = model.tokenizer.encode('<|python_tag|>{"name": "f", "parameters": {}}').tolist()
    parsed = model.assembler(tool_format=model.tool_format, new_call_id=lambda: "id")
    assert parsed.push(ids) == [ToolCallDelta(0, "id", "f", "{}")]
    plain = model.assembler()
    assert plain.fast
    assert plain.push(ids) == [ContentDelta('{"name": "f", "parameters": {}}')]


def test_reasoning_opened_by_the_prompt() -> None:
    tokenizer = small_json()
    model = TextModel(card_of(tokenizer, b""), tokenizer, FILES)
    ids = model.tokenizer.encode("hm</think>Yes").tolist()
    prompt = model.template.render([{"role": "user", "content": "Hi"}])
    assert model.assembler(prompt=prompt, reasoning=True).push(ids) == [ReasoningDelta("hm"), ContentDelta("Yes")]
    assert model.assembler(prompt=prompt).push(ids) == [ContentDelta("hm</think>Yes")]
