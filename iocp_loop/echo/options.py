"""What the echo server is told, and what it asks of the system for it: options, its socket, TLS, descriptors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..ports import DRIVERS
from .output import format_address
from .service import BACKLOG

__all__ = ["UsageError", "listen", "parse", "raise_descriptor_limit", "tls_context"]

#: Descriptors that the server asks the system for.
MAX_DESCRIPTORS = 65536

#: Most processes that ``--workers`` takes, and threads that ``--threads`` takes.
MAX_WORKERS = 256


class UsageError(Exception):
    """The server cannot do what it was told; the message is one line for whoever told it."""


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help tells more)")


def _whole_number(what: str, low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{what} is a whole number from {low} to {high}, not {text!r}")
        return number

    return parse


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"seconds from 0.01 to 86400, not {text!r}")
    return seconds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options.  Raises UsageError; exits after --help."""
    parser = _Parser(prog="python -m iocp_loop.echo", description="An echo server on a completion port.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address or name to listen on (default: %(default)s); '0.0.0.0' is every IPv4 address, "
        "'::' every address where the system can do both with one socket",
    )
    parser.add_argument(
        "--port", type=_whole_number("a port", 0, 65535), default=8888, help="default: %(default)s; 0 takes a free one"
    )
    parser.add_argument(
        "--driver",
        choices=["auto", *DRIVERS],
        help="what carries the I/O out (default: what IOCP_LOOP_DRIVER says, else auto: the best that works here)",
    )
    parser.add_argument(
        "--mode", choices=["streams", "protocol"], default="streams", help="how the server is written inside"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_whole_number("the number of workers", 1, MAX_WORKERS),
        default=1,
        help="processes that share the port (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=_whole_number("the number of threads", 1, MAX_WORKERS),
        default=1,
        help="threads of this process that share the port, a loop in each; side by side on a free-threaded Python, "
        "else by turns (default: %(default)s)",
    )
    parser.add_argument("--cert", metavar="FILE", help="serve TLS with this certificate chain (PEM)")
    parser.add_argument("--key", metavar="FILE", help="its private key (PEM), if that is not in the same file")
    parser.add_argument(
        "--stats",
        metavar="SECONDS",
        nargs="?",
        type=_interval,
        const=1.0,
        help="show statistics on stderr when they change, looking every so many seconds (default: 1): "
        "a live table on a terminal if rich is installed, else lines",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a supervisor starts us
    return parser.parse_args(arguments)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  Of the addresses that a name has, the first that exists here is taken."""
    failure: Exception | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                _bind(sock, address)
                sock.listen(BACKLOG)
                return sock
            except OSError as error:
                sock.close()
                failure = failure or error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    break
    except (OSError, ValueError) as error:  # no such name, or none that could be looked up
        failure = error
    why = getattr(failure, "strerror", None) or failure
    raise UsageError(f"cannot listen on {format_address(host, port)}: {why}")


def _bind(sock: socket.socket, address: Any) -> None:
    if sys.platform == "win32":
        # SO_REUSEADDR would let us take a port that another server listens on.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6():
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(address)


def tls_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """The TLS context for ``--cert`` and ``--key``; None without them."""
    if cert is None:
        if key is not None:
            raise UsageError("--key needs --cert")
        return None

    def no_password() -> str:
        raise ValueError("the key is encrypted; give it without a password")

    try:
        for name in filter(None, (cert, key)):
            with open(name, "rb"):
                pass  # an OSError of load_cert_chain does not tell which file it means
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        files = cert if key is None else f"{cert} and {key}"
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key does not belong to the certificate"
        elif "pem lib" in str(error).lower():
            why = "no certificate and private key in PEM form"
        else:
            why = str(error)
        raise UsageError(f"cannot use {files} for TLS: {why}") from error
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"cannot use {key or cert} for TLS: {error}") from error
    return context


def raise_descriptor_limit() -> None:
    """Allow as many open connections as the system lets us; the usual limit is 1024 descriptors."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit that it does not tell
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
