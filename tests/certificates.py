"""Certificates for the tests, made anew for each run."""

from __future__ import annotations

import ssl
from functools import cache

import trustme


@cache
def _authority() -> trustme.CA:
    return trustme.CA()


@cache
def _certificate(*names: str) -> trustme.LeafCert:
    return _authority().issue_cert(*names)


def server_context(*names: str, ask_client: bool = False) -> ssl.SSLContext:
    """A server's context, with a certificate for `names` (default: localhost); `ask_client`: want one in return."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _certificate(*(names or ("localhost",))).configure_cert(context)
    if ask_client:
        _authority().configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(name: str | None = None) -> ssl.SSLContext:
    """A client's context, which trusts the servers above; `name`: with a certificate of its own."""
    context = ssl.create_default_context()
    _authority().configure_trust(context)
    if name is not None:
        _certificate(name).configure_cert(context)
    return context
