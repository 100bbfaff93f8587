"""Who may call what."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from holdfast.base.errors import Unauthenticated
from holdfast.frontend import gate
from holdfast.frontend.gate import Forbidden, Gate
from tests.frontend.support import CHAT, TEXT, chat, config, stack

KEY = [(b"authorization", b"Bearer secret")]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("secret\n")
    path.chmod(0o600)
    return path


async def test_keys_for_all_of_v1_and_nothing_else(keys: Path) -> None:
    async with stack(1, api_keys_file=str(keys)) as one:
        for method, path in (("POST", CHAT), ("POST", TEXT), ("GET", "/v1/models"), ("GET", "/v1/models/mock")):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                got = await one.http.request(method, path, json=chat(), headers=headers)
                assert got.status_code == 401, path
                assert got.json()["error"]["code"] == "invalid_api_key"
                assert got.headers["www-authenticate"] == "Bearer"
                assert "secret" not in got.text.replace("Bearer", "")
        right = {"authorization": "Bearer secret"}
        assert (await one.http.get("/v1/models", headers=right)).status_code == 200
        assert (await one.http.post(CHAT, json=chat(), headers=right)).status_code == 200
        for path in ("/live", "/health", "/metrics", "/openapi.json", "/docs", "/debug/requests"):
            assert (await one.http.get(path)).status_code == 200, path


async def test_keys_are_checked_before_the_body_is_read(keys: Path) -> None:
    async with stack(0, api_keys_file=str(keys)) as one, one.client() as client:
        client.send(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n" % CHAT.encode())
        assert (await client.answer()).status == 401


async def test_new_keys_are_taken_over(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "REFRESH_SECONDS", 0.0)
    door = Gate(config(api_keys_file=str(keys)))
    door.admit(KEY)
    await asyncio.to_thread(keys.write_text, "another one\n")
    with pytest.raises(Unauthenticated):
        door.admit(KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_debug_routes_on_loopback(host: str, keys: Path) -> None:
    Gate(config(http_host=host)).admit_to("/debug/requests", [])
    Gate(config(http_host=host, api_keys_file=str(keys))).admit_to("/debug/requests", [])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
async def test_debug_routes_elsewhere(host: str, keys: Path) -> None:
    with pytest.raises(Forbidden, match="DYN_API_KEYS_FILE"):
        Gate(config(http_host=host)).admit_to("/debug/requests", KEY)
    guarded = Gate(config(http_host=host, api_keys_file=str(keys)))
    guarded.admit_to("/debug/requests", KEY)
    with pytest.raises(Unauthenticated):
        guarded.admit_to("/debug/requests", [])
    for path in ("/live", "/health", "/metrics", "/docs", "/openapi.json"):
        guarded.admit_to(path, [])
    Gate(config(http_host=host)).admit_to("/v1/models", [])


async def test_forbidden_is_said_in_openai_s_form() -> None:
    async with stack(0, http_host="0.0.0.0") as one:
        got = await one.http.get("/debug/requests", headers={"x-request-id": "mine"})
        assert got.status_code == 403
        assert got.json()["error"]["code"] == "forbidden"
        assert got.headers["x-request-id"] == "mine"
