"""Files by content hash, the card that names them, and the control endpoint."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.base.limits import PART_BYTES
from holdfast.models.card import PromptFiles, artifact_of
from holdfast.worker import endpoints
from holdfast.worker.card import publish
from holdfast.worker.endpoints import ArtifactEndpoint, ControlEndpoint, Controllable
from tests.worker.doubles import FakeCall, ScriptEngine


async def served(files, name):
    endpoint = ArtifactEndpoint(files)
    call = FakeCall(name)
    endpoint.serve(call)
    async with asyncio.timeout(5):
        while endpoint.active:  # noqa: ASYNC110
            await asyncio.sleep(0)
    return call


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, PART_BYTES * 40 + 7])
async def test_a_file_comes_whole_and_in_parts(size):
    data = bytes(i % 251 for i in range(size))
    name = artifact_of(data).sha256
    call = await served({name: data}, name.encode())
    assert b"".join(one[1] for one in call.said if one[0] == "data") == data
    assert max((len(one[1]) for one in call.said if one[0] == "data"), default=0) <= PART_BYTES
    assert call.words[0] == "accept"
    assert call.said[-1] == ("end", "done", None, 0)


@pytest.mark.parametrize("name", [b"", b"0" * 64, b"../etc/passwd", b"\xff" * 64, b"0" * 100_000])
async def test_unknown_files_are_not_found(name):
    call = await served({artifact_of(b"x").sha256: b"x"}, name)
    assert call.said[0][1].code == "not_found"
    assert len(call.said[0][1].message) < 400


async def test_a_stopped_transfer_stops():
    data = bytes(PART_BYTES * 100)
    endpoint = ArtifactEndpoint({artifact_of(data).sha256: data})
    call = FakeCall(artifact_of(data).sha256.encode())
    endpoint.serve(call)
    call.on_stop("gone")
    before = len(call.said)
    await asyncio.sleep(0.01)
    assert len(call.said) == before
    assert endpoint.active == 0


async def test_transfers_are_limited(monkeypatch):
    monkeypatch.setattr(endpoints, "TRANSFERS", 1)
    data = bytes(PART_BYTES * 100)
    name = artifact_of(data).sha256.encode()
    endpoint = ArtifactEndpoint({name.decode(): data})
    endpoint.serve(FakeCall(name))
    second = FakeCall(name)
    endpoint.serve(second)
    assert second.said[0][1].code == "worker_saturated"


async def test_the_card_names_the_files():
    info = await ScriptEngine().start(lambda s: None, lambda e: None, lambda w, s: None)
    published = publish(info, name="served", aliases=("also",))
    card = published.card
    assert (card.name, card.aliases, card.engine, card.context_length) == ("served", ("also",), "script", 100)
    assert published.files[card.tokenizer.sha256] == b"{}"
    files = msgspec.msgpack.decode(published.files[card.prompt_files.sha256], type=PromptFiles)
    assert files.chat_template == "template"
    assert files.generation_config == {"temperature": 0.5}
    assert publish(info).card.name == "script-model"


class Commanded:
    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        if command.get("do") == "fail":
            raise ZeroDivisionError
        if command.get("do") != "sing":
            raise InvalidRequest("no such command")
        return {"ok": True}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_request"),
        (b"[]", "invalid_request"),
        (b'{"do": "x"}', "invalid_request"),
        (b'{"do": "fail"}', "internal"),
    ],
)
def test_bad_commands_are_refused(body, code):
    call = FakeCall(body)
    ControlEndpoint(Commanded()).serve(call)
    assert [one[1].code for one in call.said] == [code]


def test_commands_are_answered():
    call = FakeCall(b'{"do": "sing"}')
    ControlEndpoint(Commanded()).serve(call)
    assert call.words == ["accept", "data", "end"]
    assert json.loads(call.said[1][1]) == {"ok": True}
    assert not isinstance(ScriptEngine(), Controllable)
