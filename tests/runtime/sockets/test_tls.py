"""TLS, and mutual TLS as the other way to prove oneself off loopback."""

import random
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import HoldfastError, InvalidRequest
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders
from tests.runtime.sockets.wiring import Site, until
from tests.wire.pairs import Sink

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: Any) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_certificate(folder, name) for name in ("worker", "caller", "stranger")}


def transport(certificates: dict[str, tuple[Path, Path]], caller: str = "", *, mutual: bool = False) -> TcpTransport:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificates["worker"])
    client = ssl.create_default_context(cafile=str(certificates["worker"][0]))
    if mutual:
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(certificates["caller"][0])
    if caller:
        client.load_cert_chain(*certificates[caller])
    return TcpTransport(client, server)


async def test_calls_and_uploads_over_tls(certificates: Any) -> None:
    async with Site(transport=transport(certificates)) as site:
        link, sink = await site.link(), Sink()
        payload = random.Random(3).randbytes(3_000_000)
        link.open("hold", OpenHeaders(), payload, sink)
        await until(lambda: site.calls)
        assert site.calls[0].payload == payload
        site.calls[0].end("done")
        await until(lambda: sink.final == "end:done")


async def test_mutual_tls_lets_only_known_callers_in_and_allows_other_interfaces(certificates: Any) -> None:
    async with Site(transport=transport(certificates, "caller", mutual=True)) as site:
        assert (await site.link()).connected
        for stranger in ("", "stranger"):
            outside = transport(certificates, stranger, mutual=True)
            link = Link(outside, site.server.address, caller="t", rng=random.Random(1))
            with pytest.raises(HoldfastError) as caught:
                await link.connect(3.0)
            assert caught.value.fault == "transport"
    server = WorkerServer("w1", 1, rng=random.Random(1), transport=transport(certificates, mutual=True))
    assert await server.start("0.0.0.0")
    await server.close()
    with pytest.raises(InvalidRequest):
        await WorkerServer("w1", 1, rng=random.Random(1), transport=transport(certificates)).start("0.0.0.0")
