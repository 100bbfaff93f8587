"""The assembled text side of a choice: same outcome for every split of the ids, right counts at a stop."""

from __future__ import annotations

import itertools
import json
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from holdfast.text.pipeline import TextAssembler, joined
from holdfast.text.reasoning import ReasoningParser
from holdfast.text.tokenizer import Tokenizer
from holdfast.text.tools import ToolParser

from .conftest import small

ANSWER = (
    "<think>\nDie Größe 漢字 👩‍👩‍👧‍👦?\n</think>\n\nI'll look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris 😀", "days": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
WANT = (
    "I'll look.",
    "Die Größe 漢字 👩‍👩‍👧‍👦?",
    [
        ToolCallDelta(0, "call0", "weather", '{"city": "Paris 😀", "days": [1, 2]}'),
        ToolCallDelta(1, "call1", "time", "{}"),
    ],
)


def full(tok: Tokenizer, stops: list[str] | None = None) -> TextAssembler:
    ids = itertools.count()
    return TextAssembler(
        tok.detokenizer(),
        stops=stops or [],
        reasoning=ReasoningParser(),
        tools=ToolParser("hermes", lambda: f"call{next(ids)}"),
    )


def run(assembler: TextAssembler, ids: list[int], sizes: random.Random | None = None) -> list[Delta]:
    out: list[Delta] = []
    at = 0
    while at < len(ids):
        size = sizes.randint(1, 7) if sizes else 1
        out += assembler.push(ids[at : at + size])
        at += size
    return out + assembler.finish()


def test_everything_at_once_for_any_split(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ANSWER).tolist()
    assert joined(run(full(tokenizer), ids)) == WANT
    for seed in range(40):
        assembler = full(tokenizer, ["never there"])
        assert joined(run(assembler, ids, random.Random(seed))) == WANT
        assert assembler.tool_calls == 2
        assert assembler.finish_reason("stop") == "tool_calls"
        assert assembler.finish_reason("length") == "length"


def test_neighbouring_deltas_are_merged(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>one two three</think>four five").tolist()
    assembler = full(tokenizer)
    out = assembler.push(ids)
    assert [type(delta) for delta in out] == [ReasoningDelta, ContentDelta]


def test_stop_string_tells_which_token_completed_it(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox END and more text after it"
    ids = tokenizer.encode(text).tolist()
    upto = next(n for n in range(len(ids)) if " END" in tokenizer.decode(ids[: n + 1]))
    for size in range(1, len(ids) + 1):
        assembler = TextAssembler(tokenizer.detokenizer(), stops=[" END"])
        assert not assembler.fast
        shown = ""
        for at in range(0, len(ids), size):
            shown += "".join([d.text for d in assembler.push(ids[at : at + size]) if isinstance(d, ContentDelta)])
            if assembler.stop is not None:
                break
        assert at + assembler.stop_index == upto
        assert assembler.stop == " END"
        assert assembler.push(ids) == []
        assert assembler.finish() == []
        assert shown == "The quick brown fox"
        assert assembler.finish_reason("length") == "stop"


def test_include_stop_and_terminal_token(small_tokenizer: Tokenizer) -> None:
    tok = small_tokenizer
    ids = [*tokenizer_ids(tok, "one two"), tok.piece_to_id("<|im_end|>") or 0]
    shown = TextAssembler(tok.detokenizer(skip_special=False))
    assert shown.push(ids, terminal=True) == [ContentDelta("one two")]
    shown = TextAssembler(tok.detokenizer(skip_special=False), include_stop=True)
    assert shown.push(ids, terminal=True) == [ContentDelta("one two<|im_end|>")]
    assert TextAssembler(tok.detokenizer(skip_special=False)).fragment(ids, terminal=True) == b"one two"
    kept = TextAssembler(tok.detokenizer(), stops=["two"], include_stop=True)
    assert kept.push(tokenizer_ids(tok, "one two three")) == [ContentDelta("one two")]


def tokenizer_ids(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text).tolist()


def test_min_tokens_delays_stop_strings(small_tokenizer: Tokenizer) -> None:
    ids = tokenizer_ids(small_tokenizer, "STOP a STOP b")
    first = len(tokenizer_ids(small_tokenizer, "STOP"))
    for size in (1, 3, len(ids)):
        assembler = TextAssembler(small_tokenizer.detokenizer(), stops=["STOP"], min_tokens=first)
        out: list[Delta] = []
        for at in range(0, len(ids), size):
            out += assembler.push(ids[at : at + size])
        assert joined(out + assembler.finish())[0] == "STOP a "
        assert assembler.stop == "STOP"


def test_fast_path_gives_the_same_as_pushing(tokenizer: Tokenizer) -> None:
    text = 'Größe "漢字"\n👩‍👩‍👧‍👦 tail 𝔘'  # noqa: RUF001
    ids = tokenizer.encode(text).tolist()
    for cut in range(len(ids) + 1):
        fast, slow = TextAssembler(tokenizer.detokenizer()), TextAssembler(tokenizer.detokenizer())
        assert fast.fast
        fragment = fast.fragment(ids[:cut]) + fast.finish_fragment()
        want = joined(slow.push(ids[:cut]) + slow.finish())[0]
        assert msgspec.json.decode(b'"' + fragment + b'"') == want == tokenizer.decode(ids[:cut])


def test_becomes_fast_once_the_thinking_is_over(tokenizer: Tokenizer) -> None:
    assembler = TextAssembler(tokenizer.detokenizer(), reasoning=ReasoningParser())
    assert not assembler.fast
    assembler.push(tokenizer.encode("<think>hm</think>\n\nNow").tolist())
    assert assembler.fast
    assert assembler.fragment(tokenizer.encode(" then").tolist()) == b" then"
    plain = TextAssembler(tokenizer.detokenizer(), tools=ToolParser("llama3_json", str))
    plain.push(tokenizer.encode("Hello").tolist())
    assert plain.fast


def test_state_is_rebuilt_by_feeding_the_same_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ANSWER + " then END here").tolist()
    whole = run(full(tokenizer, ["END"]), ids)
    for cut in range(0, len(ids), 3):
        rebuilt = full(tokenizer, ["END"])
        before = rebuilt.push(ids[:cut])
        assert joined(before + run(rebuilt, ids[cut:])) == joined(whole)


@pytest.mark.parametrize("stops", [[], ["x"]])
def test_unfinished_character_and_held_text_come_at_the_end(small_tokenizer: Tokenizer, stops: list[str]) -> None:
    ids = tokenizer_ids(small_tokenizer, "ab漢")
    assembler = TextAssembler(small_tokenizer.detokenizer(), stops=stops)
    assert joined(run(assembler, ids[:-1]))[0] == small_tokenizer.decode(ids[:-1])
    held = TextAssembler(small_tokenizer.detokenizer(), stops=["abcd"])
    assert held.push(tokenizer_ids(small_tokenizer, "xabc")) == [ContentDelta("x")]
    assert held.finish() == [ContentDelta("abc")]


def test_arguments_are_json_in_the_end(tokenizer: Tokenizer) -> None:
    _, _, calls = joined(run(full(tokenizer), tokenizer.encode(ANSWER).tolist()))
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Paris 😀", "days": [1, 2]}, {}]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_any_stops_any_split(data: st.DataObject) -> None:
    tok = small()
    words = [
        "a",
        " b",
        "<think>",
        "</think>",
        "\n",
        "<tool_call>",
        '{"name": "f", "arguments": {}}',
        "</tool_call>",
        "漢",
        "😀",
    ]
    ids = tok.encode("".join(data.draw(st.lists(st.sampled_from(words), max_size=8)))).tolist()
    ids += data.draw(st.lists(st.integers(0, tok.vocab_size + 1), max_size=6))
    stops = data.draw(st.lists(st.sampled_from(["b", " b<", "call>", "漢", "}}", "\ufffd"]), max_size=2))
    minimum = data.draw(st.integers(0, 5))

    def outcome(sizes: random.Random | None) -> tuple[object, str | None, int]:
        calls = itertools.count()
        assembler = TextAssembler(
            tok.detokenizer(),
            stops=stops,
            min_tokens=minimum,
            reasoning=ReasoningParser(),
            tools=ToolParser("hermes", lambda: f"call{next(calls)}"),
        )
        out: list[Delta] = []
        at = counted = 0
        while at < len(ids) and assembler.stop is None:
            size = sizes.randint(1, 5) if sizes else len(ids)
            out += assembler.push(ids[at : at + size])
            counted = at + assembler.stop_index + 1
            at += size
        stopped = assembler.stop is not None
        return joined(out + assembler.finish()), assembler.stop, counted if stopped else len(ids)

    want = outcome(None)
    assert outcome(random.Random(1)) == want
    assert outcome(random.Random(2)) == want
    if not stops and want[0][2] == [] and "<think>" not in tok.decode(ids):  # type: ignore[index]
        assert want[0][0] == tok.decode(ids)  # type: ignore[index]
