"""Tool calls come back out of text at every split point; whatever is no call comes back as text, whole."""

from __future__ import annotations

import itertools
import json
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.text.deltas import ContentDelta, Delta, ToolCallDelta
from holdfast.text.jsonscan import JsonScanner
from holdfast.text.template import DEFAULT_TEMPLATE
from holdfast.text.tools import TOOL_FORMATS, ToolFormat, ToolParser, detect_format

Outcome = tuple[str, list[tuple[str, str]]]


def collect(deltas: list[Delta]) -> Outcome:
    content, calls = "", []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.id is not None:
                assert delta.name
                assert delta.index == len(calls)
                assert delta.id == f"call_{delta.index}"
                calls.append((delta.name, ""))
            assert delta.index == len(calls) - 1
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + delta.arguments)
        else:
            assert isinstance(delta, ContentDelta)
            content += delta.text
    return content, calls


def parse(form: ToolFormat, pieces: list[str], stream: bool = True) -> Outcome:
    ids = itertools.count()
    parser = ToolParser(form, lambda: f"call_{next(ids)}", stream_arguments=stream)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    content, calls = collect(deltas)
    assert parser.calls == len(calls)
    return content, calls


W = '{"name": "weather", "arguments": {"city": "Pa\\"r}is", "n": [1, {"x": null}]}}'
W_ARGS = '{"city": "Pa\\"r}is", "n": [1, {"x": null}]}'
WP = W.replace("arguments", "parameters")

GOOD: list[tuple[ToolFormat, str, Outcome]] = [
    ("hermes", f"<tool_call>\n{W}\n</tool_call>", ("", [("weather", W_ARGS)])),
    ("hermes", f"Let me see.\n<tool_call>{W}</tool_call>", ("Let me see.", [("weather", W_ARGS)])),
    ("hermes", f"\n<tool_call>{W}</tool_call>\n<tool_call>\n{WP}</tool_call>\n", ("", [("weather", W_ARGS)] * 2)),
    ("hermes", f"<tool_call>{W}</tool_call> Done.", (" Done.", [("weather", W_ARGS)])),
    ("hermes", f"<tool_call>{W}<tool_call>{W}", ("", [("weather", W_ARGS)] * 2)),  # closing marks forgotten
    ("hermes", '<tool_call>{"arguments": {}, "name": "f"}</tool_call>', ("", [("f", "{}")])),  # the other order
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"t": "</tool_call>"}, "id": 3}</tool_call>',
     ("", [("f", '{"t": "</tool_call>"}')])),
    ("hermes", '<tool_call>{"type": "function", "name": "f", "arguments": {}}</tool_call>', ("", [("f", "{}")])),
    ("hermes", "just <tool talk> <tool_cal", ("just <tool talk> <tool_cal", [])),
    ("llama3_json", WP, ("", [("weather", W_ARGS)])),
    ("llama3_json", f"<|python_tag|>{WP}; {WP}", ("", [("weather", W_ARGS)] * 2)),
    ("llama3_json", f"\n{WP}\n{WP}\n", ("", [("weather", W_ARGS)] * 2)),
    ("llama3_json", f"{WP} and so on", (" and so on", [("weather", W_ARGS)])),
    ("llama3_json", f"Sure: {WP}", (f"Sure: {WP}", [])),
    ("llama3_json", '{"answer": 42}', ('{"answer": 42}', [])),
    ("llama3_json", '{"name": "Bob", "age": 5}', ('{"name": "Bob", "age": 5}', [])),
    ("llama3_json", "  hello ", ("  hello ", [])),
    ("mistral", f"[TOOL_CALLS] [{W}, {W}]", ("", [("weather", W_ARGS)] * 2)),
    ("mistral", f"Hm. [TOOL_CALLS][{W}]", ("Hm.", [("weather", W_ARGS)])),
    ("mistral", f"[TOOL_CALLS]weather{W_ARGS}", ("", [("weather", W_ARGS)])),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{W_ARGS}[TOOL_CALLS]f[CALL_ID]ab12[ARGS]{{}}",
     ("", [("weather", W_ARGS), ("f", "{}")])),
]  # fmt: skip

BAD: list[tuple[ToolFormat, str]] = [
    ("hermes", "<tool_call>\nweather(Paris)\n</tool_call>"),
    ("hermes", "<tool_call>{oops}</tool_call> text"),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no json"}</tool_call>'),
    ("hermes", "a <tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", "  \n"),
    ("llama3_json", '{"name": "f", "parameters": 3} tail'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "<|python"),
    ("mistral", "[TOOL_CALLS] what? [1]"),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS] " + "x" * 600),
    ("mistral", "[TOOL_CALLS] name [AR"),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("form", "text", "want"), GOOD)
def test_calls_at_every_split(form: ToolFormat, text: str, want: Outcome, stream: bool) -> None:
    for cut in range(len(text) + 1):
        assert parse(form, [text[:cut], text[cut:]], stream) == want, cut
    assert parse(form, list(text), stream) == want
    for _, arguments in want[1]:
        json.loads(arguments)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("form", "text"), BAD)
def test_what_is_no_call_comes_back_whole(form: ToolFormat, text: str, stream: bool) -> None:
    for cut in range(len(text) + 1):
        assert parse(form, [text[:cut], text[cut:]], stream) == (text, []), cut
    assert parse(form, list(text), stream) == (text, [])


@pytest.mark.parametrize("form", TOOL_FORMATS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_text_loses_nothing(form: ToolFormat, data: st.DataObject) -> None:
    alphabet = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        W,
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        "x",
        " ",
    ]
    alphabet += ['{"name": "f", "arguments": {"a": 1', '"', "\n", "[ARGS]", '{"name": "f", "parameters": {}}']
    text = "".join(data.draw(st.lists(st.sampled_from(alphabet), max_size=10)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    pieces = [text[a:b] for a, b in pairwise(sorted({0, len(text), *cuts}))]
    for stream in (True, False):
        whole = parse(form, [text], stream)
        assert parse(form, pieces, stream) == whole
        if not whole[1]:
            assert whole[0] == text
        if not stream:
            for _, arguments in whole[1]:
                assert isinstance(json.loads(arguments), dict)
        # Beyond calls and marks only white space may be missing from the content.
        visible = re.sub(r"\s", "", whole[0])
        rest = iter(re.sub(r"\s", "", text))
        assert all(char in rest for char in visible)


def test_arguments_stream_as_they_come() -> None:
    parser = ToolParser("hermes", lambda: "id1")
    assert parser.feed('<tool_call>{"name": "f", "argu') == []
    assert parser.feed('ments": ') == []
    assert parser.feed('{"a"') == [ToolCallDelta(0, "id1", "f"), ToolCallDelta(0, arguments='{"a"')]
    assert parser.feed(': "long') == [ToolCallDelta(0, arguments=': "long')]
    assert parser.calls == 1
    assert parser.feed('"}') == [ToolCallDelta(0, arguments='"}')]
    assert parser.feed("}</tool_call>") == []
    assert parser.finish() == []
    assert parser.calls == 1


def test_a_call_cut_off_by_length() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "lon'
    assert parse("hermes", [text]) == ("", [("f", '{"a": "lon')])
    assert parse("hermes", [text], stream=False) == (text, [])


def test_a_streamed_call_that_turns_bad_keeps_the_rest_as_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>'
    assert parse("hermes", [text]) == ("oops}}</tool_call>", [("f", '{"a": ')])
    assert parse("hermes", [text], stream=False) == (text, [])


def test_format_detection() -> None:
    assert detect_format(DEFAULT_TEMPLATE) == "hermes"
    assert detect_format("... [TOOL_CALLS] ...") == "mistral"
    assert detect_format("<|python_tag|>") == "llama3_json"
    assert detect_format("""'{"name": "' + name + '", "parameters": '""") == "llama3_json"
    assert detect_format("<tool_call><function=") is None
    assert detect_format("<tool_call>name<arg_key>") is None
    assert detect_format("{{ messages }}") is None


def strict_prefix_end(text: str) -> int | None:
    """Length of the JSON object at the start of the text, by the standard library."""
    blank = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = json.JSONDecoder(parse_constant=lambda c: 1 / 0).raw_decode(text, blank)
    except (ValueError, ZeroDivisionError):
        return None
    return end if isinstance(value, dict) else None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    value=st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3),
    damage=st.lists(st.tuples(st.integers(0, 200), st.sampled_from('{}[]",:\\ 0-e.tn\n\x01é')), max_size=2),
    indent=st.sampled_from([None, 1]),
)
def test_scanner_agrees_with_the_standard_library(
    value: dict[str, object], damage: list[tuple[int, str]], indent: int | None
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False) + " tail"
    for at, char in damage:
        text = text[: at % len(text)] + char + text[at % len(text) + 1 :]
    whole = JsonScanner()
    end = whole.feed(text)
    want = strict_prefix_end(text)
    assert (whole.state == "done") == (want is not None), text
    if want is not None:
        assert end == want
    single = JsonScanner()
    taken = sum(single.feed(char) for char in text)
    assert (single.state, taken, single.closings) == (whole.state, end, whole.closings)


def test_scanner_bounds_depth_and_number_length() -> None:
    for text in ('{"a":' + "[" * 500, '{"a": 1' + "0" * 1_000):
        scanner = JsonScanner()
        scanner.feed(text)
        assert scanner.state == "bad"


def test_long_arguments_cost_linear_time() -> None:
    rng = random.Random(1)
    body = json.dumps({"text": "".join(rng.choice('abc \n"{}') for _ in range(60_000))})
    text = f'<tool_call>{{"name": "f", "arguments": {body}}}</tool_call>'
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    for stream in (True, False):
        assert parse("hermes", pieces, stream) == ("", [("f", body)])
