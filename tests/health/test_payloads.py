"""Canary payloads: one for every engine and role, BOS by lookup, overrides that cannot do harm."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import Capabilities, EngineInfo, ModelFiles, unpack_ids
from holdfast.health import payloads
from holdfast.health.payloads import (
    HealthCheckPayload,
    SglangDisaggHealthCheckPayload,
    SglangHealthCheckPayload,
    TrtllmHealthCheckPayload,
    VllmHealthCheckPayload,
    VllmPrefillHealthCheckPayload,
    bos_of,
    find_bos,
    payload_for,
    read_payload,
    request_of,
)

FILES = ModelFiles(
    json.dumps({"added_tokens": [{"id": 9, "content": "<s>"}], "model": {"vocab": {"a": 0}}}).encode(), "", "<s>"
)


def info(engine: str, files: ModelFiles = FILES) -> EngineInfo:
    return EngineInfo(engine, "1", "m", 100, 16, 10, 2, 8, (2,), 100, "f", Capabilities(), files)


VLLM_STOPS = {
    "max_tokens": 1,
    "stop": None,
    "stop_token_ids": None,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
}


@pytest.mark.parametrize(
    ("engine", "role", "kind", "expected"),
    [
        (
            "vllm",
            "decode",
            VllmHealthCheckPayload,
            {
                "token_ids": [9],
                "sampling_options": {"temperature": 0.0},
                "stop_conditions": VLLM_STOPS,
                "_HEALTH_CHECK": True,
            },
        ),
        ("vllm", "prefill", VllmPrefillHealthCheckPayload, {"token_ids": [9]}),
        (
            "sglang",
            "aggregated",
            SglangHealthCheckPayload,
            {
                "token_ids": [9],
                "stop_conditions": {"max_tokens": 1, "ignore_eos": False},
                "sampling_options": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
                "eos_token_ids": [],
                "annotations": [],
            },
        ),
        (
            "sglang",
            "decode",
            SglangDisaggHealthCheckPayload,
            {"bootstrap_info": {"bootstrap_host": "2.2.2.2", "bootstrap_port": 0, "bootstrap_room": 0}},
        ),
        ("sglang", "prefill", SglangDisaggHealthCheckPayload, {"token_ids": [9]}),
        (
            "trtllm",
            "prefill",
            TrtllmHealthCheckPayload,
            {
                "token_ids": [9],
                "stop_conditions": {**VLLM_STOPS, "min_tokens": 0},
                "disaggregated_params": {"request_type": "context_and_generation"},
                "_HEALTH_CHECK": True,
            },
        ),
        ("mock", "aggregated", payloads.MockHealthCheckPayload, {"token_ids": [9]}),
        ("llamacpp", "aggregated", payloads.LlamaCppHealthCheckPayload, {"token_ids": [9]}),
        ("mirror", "aggregated", payloads.TokenHealthCheckPayload, {"token_ids": [9]}),
    ],
)
def test_every_engine_and_role_has_a_payload(engine: str, role: Any, kind: type, expected: dict[str, Any]) -> None:
    payload = payload_for(info(engine), role=role)
    assert type(payload) is kind
    found = payload.to_dict()
    assert {key: found[key] for key in expected} == expected
    request = request_of(found, model="m", request_id="c")
    assert (unpack_ids(request.prompt_ids), request.stop.max_tokens, request.sampling.temperature) == ([9], 1, 0.0)
    assert set(request.extra) == set(found) - {"token_ids", "sampling_options", "stop_conditions"}
    msgspec.msgpack.encode(request)


def test_the_roles_that_need_no_more_have_no_more() -> None:
    assert "disaggregated_params" not in TrtllmHealthCheckPayload(None, override="").to_dict()
    assert "_HEALTH_CHECK" not in SglangHealthCheckPayload(None, override="").to_dict()
    port = SimpleNamespace(server_args=SimpleNamespace(disaggregation_bootstrap_port=8998))
    assert SglangDisaggHealthCheckPayload(port, override="").to_dict()["bootstrap_info"]["bootstrap_port"] == 8998


def test_text_instead_of_tokens() -> None:
    flat = VllmHealthCheckPayload(None, use_text_input=True, override="").to_dict()
    assert flat == {"prompt": "Test", "temperature": 0.0, **VLLM_STOPS, "_HEALTH_CHECK": True}
    assert SglangHealthCheckPayload(None, use_text_input=True, override="").to_dict()["prompt"] == "Test"
    assert request_of(flat, model="m", request_id="c").extra["prompt"] == "Test"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (SimpleNamespace(bos_token_id=5), 5),
        (SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=6)), 6),
        (SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=7))), 7),
        (SimpleNamespace(tokenizer_manager=SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=8))), 8),
        (SimpleNamespace(llm=SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=0))), 0),
        (SimpleNamespace(bos_token_id=None), 1),
        (SimpleNamespace(bos_token_id=True), 1),
        (None, 1),
    ],
)
def test_bos_is_looked_up_and_has_a_fallback(source: object, expected: int) -> None:
    assert find_bos(source) == expected


@pytest.mark.parametrize(
    "files", [ModelFiles(b"{}", "", "<s>"), ModelFiles(b"not json", "", "<s>"), ModelFiles(FILES.tokenizer_json, "")]
)
def test_files_that_do_not_know_bos(files: ModelFiles) -> None:
    assert bos_of(files) is None
    assert payload_for(info("mock", files)).to_dict()["token_ids"] == [1]


def test_a_subclass_must_say_what_it_asks_for() -> None:
    class Empty(HealthCheckPayload):
        pass

    with pytest.raises(NotImplementedError, match="Empty must set default_payload"):
        Empty()


def test_an_override_by_json_or_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", '{"token_ids": [3, 4], "stop_conditions": {"max_tokens": 2}}')
    payload = VllmHealthCheckPayload(None)
    assert payload.overridden
    assert unpack_ids(request_of(payload.to_dict(), model="m", request_id="c").prompt_ids) == [3, 4]
    file = tmp_path / "canary.json"
    file.write_text('{"token_ids": [7]}')
    assert read_payload(f"@{file}") == {"token_ids": [7]}
    payload.reject_override("token 3 is out of range")
    assert payload.to_dict()["token_ids"] == [1]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        '"text"',
        "@/does/not/exist.json",
        "@",
        '{"token_ids": "hello"}',
        '{"token_ids": [-1]}',
        '{"token_ids": [99999999999]}',
        '{"stop_conditions": {"max_tokens": "many"}}',
    ],
)
def test_bad_overrides_are_reported_and_ignored(bad: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        payload = payload_for(info("mock"), override=bad)
    assert not payload.overridden
    assert payload.to_dict()["token_ids"] == [9]
    assert ["DYN_HEALTH_CHECK_PAYLOAD is ignored" in record.message for record in caplog.records] == [True]


def test_ranks_are_asked_by_name() -> None:
    assert request_of({}, model="m", request_id="c", rank=1).extra == {"data_parallel_rank": 1}
    with pytest.raises(InvalidRequest):
        request_of({"sampling_options": 3}, model="m", request_id="c")
