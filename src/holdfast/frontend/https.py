"""HTTPS of the frontend's port, by the names of the reference (``DYN_TLS_*``).

Must never fall back to plain HTTP when something is missing.
"""

from __future__ import annotations

import ssl
from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.runtime.tls import server_context
from holdfast.runtime.tls_renewal import Renewal


class HttpTls(msgspec.Struct, frozen=True, kw_only=True):
    """Files are PEM. All empty: plain HTTP."""

    tls_cert_path: Annotated[
        str, setting("DYN_TLS_CERT_PATH", "Certificate chain of the HTTP API; with it the port speaks HTTPS.")
    ] = ""
    tls_key_path: Annotated[str, setting("DYN_TLS_KEY_PATH", "Its private key.")] = ""
    tls_client_ca_cert_path: Annotated[
        str,
        setting("DYN_TLS_CLIENT_CA_CERT_PATH", "CA that clients' certificates must come from; empty: none asked."),
    ] = ""

    @property
    def scheme(self) -> str:
        """``https`` or ``http``."""
        return "https" if self.tls_cert_path else "http"


def https_context(tls: HttpTls, renewal: Renewal | None = None) -> ssl.SSLContext | None:
    """Return the context of the listener; None: plain HTTP.

    Args:
        tls: the settings.
        renewal: is told which files are in use; None: they are read once.

    Raises:
        InvalidSetting: naming what is wrong with a file.
    """
    context = server_context(
        ("DYN_TLS_CERT_PATH", tls.tls_cert_path),
        ("DYN_TLS_KEY_PATH", tls.tls_key_path),
        ("DYN_TLS_CLIENT_CA_CERT_PATH", tls.tls_client_ca_cert_path),
        renewal if renewal is not None else Renewal(),
    )
    if context is not None:
        context.set_alpn_protocols(["http/1.1"])
    return context


def own_client_context(tls: HttpTls, renewal: Renewal | None = None) -> ssl.SSLContext | None:
    """Return what programs of ours on this machine call such a frontend with; None: plain HTTP.

    They believe exactly the certificate that is configured, whatever name it carries, and show it themselves.

    Args:
        tls: the frontend's settings.
        renewal: for processes that outlive a certificate; None: the files are read once.
    """
    if https_context(tls) is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(tls.tls_cert_path)
    context.load_cert_chain(tls.tls_cert_path, tls.tls_key_path)
    if renewal is not None:
        cert, key = ("DYN_TLS_CERT_PATH", tls.tls_cert_path), ("DYN_TLS_KEY_PATH", tls.tls_key_path)
        renewal.watch_ca(context, cert)
        renewal.watch_pair(context, cert, key)
    return context
