"""Certificates that change under a running process: new handshakes get the new one, and nothing bad gets in."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from holdfast.base.errors import CannotConnect
from holdfast.runtime.tls import WireTls, open_transport
from holdfast.runtime.tls_renewal import Renewal
from holdfast.runtime.transport import Listener
from tests.patience import within
from tests.support.pki import HAVE_OPENSSL, Authority

pytestmark = pytest.mark.skipif(not HAVE_OPENSSL, reason="needs openssl to make certificates")


class Served:
    """A TLS listener by settings, whose files are exchanged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.authority = Authority(folder)
        self.cert, self.key, self.ca = (folder / f"live.{kind}" for kind in ("pem", "key", "ca"))
        self.install("first")
        shutil.copy(self.authority.cert, self.ca)
        self.renewal = Renewal()
        self.settings = WireTls(
            tcp_tls_cert_path=str(self.cert),
            tcp_tls_key_path=str(self.key),
            tcp_tls_ca_cert_path=str(self.ca),
        )
        self.transport = open_transport(self.settings, serves=True, renewal=self.renewal)
        self.listener: Listener

    def install(self, name: str, authority: Authority | None = None) -> None:
        """Put another certificate in place, as a certificate manager does."""
        cert, key = (authority or self.authority).issue(name)
        for source, target in ((cert, self.cert), (key, self.key)):
            fresh = target.with_suffix(".fresh")
            shutil.copy(source, fresh)
            fresh.replace(target)

    async def shown(self) -> str:
        """Return the name on the certificate that a new connection gets to see."""
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        context.check_hostname = False
        host, _, port = self.listener.address.rpartition(":")
        async with asyncio.timeout(within(5)):
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        certificate = writer.get_extra_info("peercert")
        writer.close()
        return str(certificate["subjectAltName"][0][1])


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    one = Served(tmp_path)
    one.listener = await one.transport.listen("127.0.0.1", 0, asyncio.Protocol)
    yield one
    await one.listener.close()


async def test_a_new_certificate_is_shown_to_whoever_connects_next(served: Served) -> None:
    assert await served.shown() == "first"
    served.install("second")
    assert await served.shown() == "first", "until somebody looks"
    served.renewal.look()
    assert await served.shown() == "second"


async def test_half_a_change_and_rubbish_leave_the_old_one_in_force(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cert, _ = served.authority.issue("half")
    shutil.copy(cert, served.cert)  # its key is still to come
    served.renewal.look()
    served.renewal.look()
    assert await served.shown() == "first"
    assert [r.levelname for r in caplog.records if "cannot be used" in r.getMessage()] == ["WARNING"], "said once"
    served.cert.write_text("rubbish")
    served.renewal.look()
    served.cert.unlink()
    served.renewal.look()
    assert await served.shown() == "first"
    served.install("whole")
    served.renewal.look()
    assert await served.shown() == "whole"
    assert "loaded anew" in caplog.text
    assert "BEGIN" not in caplog.text, "never what is in a file"


async def test_callers_believe_a_further_ca(served: Served, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "successor")
    served.install("of.the.successor", other)
    served.renewal.look()
    name = "of.the.successor"
    caller = open_transport(
        WireTls(tcp_tls_ca_cert_path=str(served.ca), tcp_tls_server_name=name), serves=False, renewal=served.renewal
    )
    address = served.listener.address
    with pytest.raises(CannotConnect, match="not accepted"):
        await caller.connect(address, asyncio.Protocol, within(5))
    both = served.authority.cert.read_text() + other.cert.read_text()
    served.ca.write_text(both)
    served.renewal.look()
    await caller.connect(address, asyncio.Protocol, within(5))


async def test_it_looks_by_itself(served: Served) -> None:
    renewal = Renewal(every=0.01)
    listener = await open_transport(served.settings, serves=True, renewal=renewal).listen(
        "127.0.0.1", 0, asyncio.Protocol
    )
    await served.listener.close()
    served.listener = listener
    looking = asyncio.create_task(renewal.run())
    served.install("by.itself")
    async with asyncio.timeout(within(5)):
        while await served.shown() != "by.itself":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    looking.cancel()


def test_without_files_there_is_nothing_to_do() -> None:
    renewal = Renewal()
    open_transport(WireTls(), serves=True, renewal=renewal)
    assert not renewal
