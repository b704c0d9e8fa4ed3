"""A certificate for the server under load, made anew for each: it costs a hundredth of a second."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .processes import RunFailed

__all__ = ["make_certificate"]


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Files with a self-signed certificate for 127.0.0.1 and its key (P-256), in PEM.  Raises RunFailed."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunFailed("the command openssl is not there to make a certificate") from None
    if made.returncode:
        raise RunFailed(f"openssl made no certificate: {made.stderr.strip().splitlines()[-1:]}")
    return certificate, key
