"""A certificate authority for tests, made with the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HAVE_OPENSSL = shutil.which("openssl") is not None
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """A CA in a folder of its own.

    Args:
        folder: where its files go.
        name: of the CA.
    """

    def __init__(self, folder: Path, name: str = "ca"):
        self._folder = folder
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        subject = ["-subj", f"/CN={name}", "-days", "2"]
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.cert, *subject)

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """Return certificate and key of somebody.

        Args:
            name: the subject, and of the files.
            names: subject alternative names, as ``DNS:x`` or ``IP:x``; none: one DNS name, the subject.
        """
        cert, key, request = (self._folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={','.join(names or (f'DNS:{name}',))}\n")
        _openssl("req", "-new", *_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signed = ("-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-days", "2", "-extfile", extensions)
        _openssl("x509", "-req", "-in", request, "-out", cert, *signed)
        return cert, key


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
