"""TLS for the wire protocol: from files to the transport, with a sentence for everything that can be wrong with them.

With a certificate a worker listens with TLS; with a CA for callers it demands one of them too (mutual TLS). Callers
speak TLS when they know a CA for the workers. Names and meanings are those of the reference (``DYN_TCP_TLS_*``).

Must never fall back to plain TCP when something is missing, and never log what is in a file.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

import msgspec

from holdfast.base.settings import InvalidSetting, setting
from holdfast.runtime.tls_renewal import Renewal
from holdfast.runtime.transport import TcpTransport


class WireTls(msgspec.Struct, frozen=True, kw_only=True):
    """Files are PEM. All empty: plain TCP."""

    tcp_tls_cert_path: Annotated[
        str, setting("DYN_TCP_TLS_CERT_PATH", "Certificate chain with which a worker listens; empty: plain TCP.")
    ] = ""
    tcp_tls_key_path: Annotated[str, setting("DYN_TCP_TLS_KEY_PATH", "Its private key.")] = ""
    tcp_tls_ca_cert_path: Annotated[
        str,
        setting("DYN_TCP_TLS_CA_CERT_PATH", "CA certificates that workers' must come from; with it callers speak TLS."),
    ] = ""
    tcp_tls_client_cert_path: Annotated[
        str, setting("DYN_TCP_TLS_CLIENT_CERT_PATH", "Certificate chain that callers show to workers (mutual TLS).")
    ] = ""
    tcp_tls_client_key_path: Annotated[
        str, setting("DYN_TCP_TLS_CLIENT_KEY_PATH", "The private key of the callers' certificate.")
    ] = ""
    tcp_tls_client_ca_cert_path: Annotated[
        str,
        setting("DYN_TCP_TLS_CLIENT_CA_CERT_PATH", "CA that callers' certificates must come from; empty: none asked."),
    ] = ""
    tcp_tls_server_name: Annotated[
        str,
        setting("DYN_TCP_TLS_SERVER_NAME", "Name that workers' certificates must carry; empty: the address's host."),
    ] = ""
    tcp_tls_insecure: Annotated[
        bool, setting("DYN_TCP_TLS_INSECURE", "Encrypt without checking who the worker is; for tests only.")
    ] = False
    tcp_tls_handshake_timeout_secs: Annotated[
        float, setting("DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS", "A TLS handshake must be over within this.", gt=0)
    ] = 3.0


def open_transport(tls: WireTls, *, serves: bool, renewal: Renewal | None = None) -> TcpTransport:
    """Return the transport that the settings ask for.

    Args:
        tls: the settings.
        serves: whether this process listens (a worker), and calls itself to test that.
        renewal: is told which files are in use; None: they are read once.

    Raises:
        InvalidSetting: a file is missing, cannot be read, is not what it should be, or does not fit another.
    """
    renewal = renewal if renewal is not None else Renewal()
    server = _server(tls, renewal) if serves else None
    if server is not None and not (tls.tcp_tls_ca_cert_path or tls.tcp_tls_insecure):
        raise InvalidSetting(
            "DYN_TCP_TLS_CERT_PATH is set, DYN_TCP_TLS_CA_CERT_PATH is not: a worker tests itself over its own address "
            "and must know which CA its own certificate comes from."
        )
    return TcpTransport(
        _client(tls, renewal, own_certificate=serves),
        server,
        server_name=tls.tcp_tls_server_name,
        handshake_timeout=tls.tcp_tls_handshake_timeout_secs,
    )


def server_context(
    cert: tuple[str, str], key: tuple[str, str], client_ca: tuple[str, str], renewal: Renewal
) -> ssl.SSLContext | None:
    """Return the context of a listener; None when no certificate is set. Files: (setting, path) each.

    Raises:
        InvalidSetting: as `open_transport`.
    """
    _check_pair(cert, key)
    if not cert[1]:
        if client_ca[1]:
            raise InvalidSetting(
                f"{client_ca[0]} is set, {cert[0]} is not: without TLS no certificate can be asked for."
            )
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load_pair(context, cert, key, renewal)
    if client_ca[1]:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_ca(context, client_ca, renewal)
    return context


def _server(tls: WireTls, renewal: Renewal) -> ssl.SSLContext | None:
    return server_context(
        ("DYN_TCP_TLS_CERT_PATH", tls.tcp_tls_cert_path),
        ("DYN_TCP_TLS_KEY_PATH", tls.tcp_tls_key_path),
        ("DYN_TCP_TLS_CLIENT_CA_CERT_PATH", tls.tcp_tls_client_ca_cert_path),
        renewal,
    )


def _client(tls: WireTls, renewal: Renewal, *, own_certificate: bool) -> ssl.SSLContext | None:
    cert = ("DYN_TCP_TLS_CLIENT_CERT_PATH", tls.tcp_tls_client_cert_path)
    key = ("DYN_TCP_TLS_CLIENT_KEY_PATH", tls.tcp_tls_client_key_path)
    _check_pair(cert, key)
    if own_certificate and not cert[1]:
        cert = ("DYN_TCP_TLS_CERT_PATH", tls.tcp_tls_cert_path)
        key = ("DYN_TCP_TLS_KEY_PATH", tls.tcp_tls_key_path)
    if not (tls.tcp_tls_ca_cert_path or tls.tcp_tls_insecure):
        if tls.tcp_tls_client_cert_path:
            raise InvalidSetting(
                "DYN_TCP_TLS_CLIENT_CERT_PATH is set, DYN_TCP_TLS_CA_CERT_PATH is not: callers speak TLS only when "
                "they know which CA the workers' certificates come from."
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.tcp_tls_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        _load_ca(context, ("DYN_TCP_TLS_CA_CERT_PATH", tls.tcp_tls_ca_cert_path), renewal)
    if cert[1]:
        _load_pair(context, cert, key, renewal)
    return context


def _check_pair(cert: tuple[str, str], key: tuple[str, str]) -> None:
    if bool(cert[1]) != bool(key[1]):
        there, missing = (cert[0], key[0]) if cert[1] else (key[0], cert[0])
        raise InvalidSetting(f"{there} is set, {missing} is not: a certificate and its key come as a pair.")


def _load_pair(context: ssl.SSLContext, cert: tuple[str, str], key: tuple[str, str], renewal: Renewal) -> None:
    for one in (cert, key):
        _readable(*one)
    try:
        context.load_cert_chain(cert[1], key[1], password=lambda: b"")
    except ssl.SSLError as error:
        mismatch = "KEY_VALUES_MISMATCH" in str(error)
        why = "the key does not belong to the certificate" if mismatch else f"not a PEM pair ({error.reason or error})"
        raise InvalidSetting(f"{cert[0]}={cert[1]}, {key[0]}={key[1]}: {why}.") from None
    renewal.watch_pair(context, cert, key)


def _load_ca(context: ssl.SSLContext, ca: tuple[str, str], renewal: Renewal) -> None:
    _readable(*ca)
    try:
        context.load_verify_locations(ca[1])
    except ssl.SSLError as error:
        raise InvalidSetting(f"{ca[0]}={ca[1]}: holds no CA certificate in PEM ({error.reason or error}).") from None
    renewal.watch_ca(context, ca)


def _readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise InvalidSetting(f"{name}={path}: cannot be read ({error.strerror}).") from None
