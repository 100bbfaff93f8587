"""`holdfast serve` whose clients speak HTTPS: streams, the shared port, our own programs, known clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
from pathlib import Path

import httpx
import pytest
from tests.cli.test_serve import DEADLINE, Serving, serving, started
from tests.support.pki import HAVE_OPENSSL, Authority

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not HAVE_OPENSSL, reason="needs openssl to make certificates")]
QUESTION = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "stream": True}


def client(served: Serving, authority: Authority, *pair: Path) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(authority.cert))
    if pair:
        context.load_cert_chain(*pair)
    return httpx.AsyncClient(base_url=served.url, verify=context, timeout=30)


async def asked(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/chat/completions", json=QUESTION)
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    return answer.text


async def test_two_frontends_behind_one_https_port(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("api", "IP:127.0.0.1", "DNS:localhost")
    files = ("--tls-cert-path", str(cert), "--tls-key-path", str(key))
    async with serving(tmp_path, "--workers", "1", "--frontends", "2", *files) as served:
        assert served.url.startswith("https://"), "serve found its own frontends ready"
        for _ in range(6):
            async with client(served, authority) as http:
                await asked(http)
        port = int(served.url.rpartition(":")[2])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get("/live")
        own = served.ready["frontend_urls"][0].rpartition(":")[2]
        for command in (["status", "--json"], ["explain"]):
            async with started(tmp_path, *command, "--http-port", own, *files) as process:
                out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
            assert process.returncode == 0, err.decode()
            if command[0] == "status":
                assert json.loads(out)["frontends"][0]["models"] == {"mock": 1}
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(served.process.wait(), DEADLINE) == 0


async def test_clients_may_have_to_prove_themselves(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("api", "IP:127.0.0.1")
    known = authority.issue("known")
    flags = ("--tls-cert-path", str(cert), "--tls-key-path", str(key), "--tls-client-ca-cert-path", str(authority.cert))
    async with serving(tmp_path, "--workers", "1", *flags) as served:
        async with client(served, authority, *known) as http:
            await asked(http)
        async with client(served, authority) as stranger:
            with pytest.raises(httpx.HTTPError):
                await stranger.get("/live")
        served.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(served.process.wait(), DEADLINE)


async def test_a_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    async with started(tmp_path, "frontend", "--http-port", "0", "--tls-key-path", "x.key") as process:
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 78
    assert "DYN_TLS_KEY_PATH is set, DYN_TLS_CERT_PATH is not" in err.decode()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
