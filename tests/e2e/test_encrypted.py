"""A fleet whose wire is mutual TLS with a CA made here: it serves, moves streams exactly, and lets no stranger in."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from holdfast.base.errors import HoldfastError
from holdfast.local.backoff import EXIT_CONFIGURATION
from holdfast.runtime.link import Link
from holdfast.runtime.tls import WireTls, open_transport
from tests.e2e.asking import exact, streaming
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within
from tests.support.pki import HAVE_OPENSSL, Authority

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not HAVE_OPENSSL, reason="needs openssl to make certificates"),
]
NAME = "worker.fleet.internal"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pki")
    authority, strangers = Authority(folder), Authority(folder, "strangers")
    found = {"ca": authority.cert}
    for name, issuer in ((NAME, authority), ("frontend", authority), ("stranger", strangers)):
        found[name], found[f"{name}.key"] = issuer.issue(name)
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def encrypted(pki: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    env = {
        "DYN_TCP_TLS_CERT_PATH": str(pki[NAME]),
        "DYN_TCP_TLS_KEY_PATH": str(pki[f"{NAME}.key"]),
        "DYN_TCP_TLS_CA_CERT_PATH": str(pki["ca"]),
        "DYN_TCP_TLS_CLIENT_CERT_PATH": str(pki["frontend"]),
        "DYN_TCP_TLS_CLIENT_KEY_PATH": str(pki["frontend.key"]),
        "DYN_TCP_TLS_CLIENT_CA_CERT_PATH": str(pki["ca"]),
        "DYN_TCP_TLS_SERVER_NAME": NAME,
    }
    async with cluster(tmp_path_factory.mktemp("encrypted"), env=env) as running:
        await running.usable()
        yield running


async def test_answers_and_a_crash_are_as_without_tls(encrypted: Cluster) -> None:
    await exact(encrypted, Ask(content="over tls", max_tokens=20))
    large = Ask(content="word " * 14_000, max_tokens=3)  # over the bulk connection
    await exact(encrypted, large)
    question = Ask(content="crash", max_tokens=150)
    async with streaming(encrypted, question) as live:
        await live.until_pieces(20)
        encrypted.kill(live.answer.worker)
        answer = await live.done()
    check(question, answer)
    assert answer.causes == ["disconnected"]
    await encrypted.usable()


async def test_strangers_are_kept_out(encrypted: Cluster, pki: dict[str, Path]) -> None:
    address = next(iter((await encrypted.instances()).values()))["transport"]["tcp"]
    ca, name = str(pki["ca"]), NAME

    async def tries(tls: WireTls) -> str:
        link = Link(open_transport(tls, serves=False), address, caller="stranger", rng=random.Random(1))
        try:
            await link.connect(5.0)
        except HoldfastError as error:
            return f"{error.fault}: {error.message}"
        finally:
            await link.close()
        return ""

    known = {"tcp_tls_ca_cert_path": ca, "tcp_tls_server_name": name}
    mine = {"tcp_tls_client_cert_path": str(pki["frontend"]), "tcp_tls_client_key_path": str(pki["frontend.key"])}
    theirs = {"tcp_tls_client_cert_path": str(pki["stranger"]), "tcp_tls_client_key_path": str(pki["stranger.key"])}
    assert await tries(WireTls(**known, **mine)) == ""  # type: ignore[arg-type]
    for stranger in (WireTls(), WireTls(**known), WireTls(**known, **theirs)):  # type: ignore[arg-type]
        refused = await tries(stranger)
        assert refused.startswith("transport: ")
        assert "DYN_TCP_TLS" in refused, "the message leads to the settings"
    wrong = {**known, "tcp_tls_server_name": "somebody.else"}
    assert "not accepted" in await tries(WireTls(**wrong, **mine)), "a worker of another name"  # type: ignore[arg-type]
    await exact(encrypted, Ask(content="still there", max_tokens=3))


async def test_a_worker_whose_files_are_wrong_says_so_and_is_not_restarted(
    tmp_path: Path, pki: dict[str, Path]
) -> None:
    flags = ("--tcp-tls-cert-path", str(pki[NAME]), "--tcp-tls-key-path", str(tmp_path / "none.key"))
    command = [sys.executable, "-m", "holdfast", "worker", "--engine", "mock", "--file-kv", str(tmp_path), *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await asyncio.wait_for(process.communicate(), within(20))
    assert process.returncode == EXIT_CONFIGURATION
    assert f"DYN_TCP_TLS_KEY_PATH={tmp_path}/none.key: cannot be read (No such file or directory)" in err.decode()
