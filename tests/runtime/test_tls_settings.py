"""TLS of the wire by settings: what is asked for is what comes out, and every wrong file has its own sentence."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.base.settings import InvalidSetting
from holdfast.runtime.tls import WireTls, open_transport
from tests.support.pki import HAVE_OPENSSL, Authority

pytestmark = pytest.mark.skipif(not HAVE_OPENSSL, reason="needs openssl to make certificates")

Files = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pki")
    authority = Authority(folder)
    worker, other = authority.issue("worker"), authority.issue("other")
    (folder / "text").write_text("not PEM")
    return {
        "ca": str(authority.cert),
        "cert": str(worker[0]),
        "key": str(worker[1]),
        "other_key": str(other[1]),
        "text": str(folder / "text"),
        "none": str(folder / "none.pem"),
        "folder": str(folder),
    }


def tls(files: Files, **settings: str | bool) -> WireTls:
    """Settings by short name; values are names of files where there is such a file."""
    found = {f"tcp_tls_{k}": files.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    return WireTls(**found)  # type: ignore[arg-type]


def test_nothing_set_is_plain_tcp(files: Files) -> None:
    transport = open_transport(tls(files), serves=True)
    assert (transport._client_tls, transport._server_tls, transport.authenticates_callers) == (None, None, False)


def test_a_worker_with_a_certificate_and_one_that_demands_them(files: Files) -> None:
    pair = {"cert_path": "cert", "key_path": "key", "ca_cert_path": "ca"}
    assert not open_transport(tls(files, **pair), serves=True).authenticates_callers
    mutual = open_transport(tls(files, **pair, client_ca_cert_path="ca"), serves=True)
    assert mutual.authenticates_callers, "the other way to prove oneself off loopback"
    caller = open_transport(tls(files, ca_cert_path="ca", client_cert_path="cert", client_key_path="key"), serves=False)
    assert caller._server_tls is None
    assert caller._client_tls is not None
    assert caller._client_tls.verify_mode == ssl.CERT_REQUIRED
    careless = open_transport(tls(files, insecure=True), serves=False)
    assert careless._client_tls is not None
    assert careless._client_tls.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("settings", "serves", "sentence"),
    [
        ({"cert_path": "cert", "ca_cert_path": "ca"}, True, "TLS_CERT_PATH is set, DYN_TCP_TLS_KEY_PATH is not"),
        ({"key_path": "key"}, True, "KEY_PATH is set, DYN_TCP_TLS_CERT_PATH is not"),
        ({"cert_path": "cert", "key_path": "key"}, True, "DYN_TCP_TLS_CA_CERT_PATH is not"),
        ({"cert_path": "none", "key_path": "key", "ca_cert_path": "ca"}, True, "No such file"),
        ({"cert_path": "folder", "key_path": "key", "ca_cert_path": "ca"}, True, "Is a directory"),
        ({"cert_path": "cert", "key_path": "other_key", "ca_cert_path": "ca"}, True, "does not belong to the cert"),
        ({"cert_path": "text", "key_path": "key", "ca_cert_path": "ca"}, True, "not a PEM pair"),
        ({"ca_cert_path": "text"}, False, "DYN_TCP_TLS_CA_CERT_PATH=.* no CA certificate in PEM"),
        ({"ca_cert_path": "none"}, False, "DYN_TCP_TLS_CA_CERT_PATH=.* cannot be read"),
        ({"client_ca_cert_path": "ca"}, True, "CLIENT_CA_CERT_PATH is set, DYN_TCP_TLS_CERT_PATH is not"),
        ({"client_cert_path": "cert", "client_key_path": "key"}, False, "DYN_TCP_TLS_CA_CERT_PATH is not"),
        ({"client_cert_path": "cert", "ca_cert_path": "ca"}, False, "DYN_TCP_TLS_CLIENT_KEY_PATH is not"),
    ],
)
def test_every_mistake_is_named(files: Files, settings: Files, serves: bool, sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        open_transport(tls(files, **settings), serves=serves)


def test_a_file_that_may_not_be_read_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = Path.open

    def denied(path: Path, *arguments: object, **more: object) -> object:
        if str(path) == files["key"]:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InvalidSetting, match=r"DYN_TCP_TLS_KEY_PATH=.*Permission denied"):
        open_transport(tls(files, cert_path="cert", key_path="key", ca_cert_path="ca"), serves=True)
