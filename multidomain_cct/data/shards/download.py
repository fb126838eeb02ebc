"""Files from http(s) and s3 addresses, over unreliable connections.

http(s) is read with the standard library, which needs no installation and keeps no state that a fork would copy; s3 is
read through fsspec.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import file_sha256

PROTOCOLS = ("http", "https", "s3")
_CHUNK = 1 << 20
_PART = 8 << 20
"""Bytes per request to s3; the rate is checked between two requests."""
_MAX_UNKNOWN = 1 << 30
"""Largest size of a file whose size is not announced, in bytes."""


class SourceError(OSError):
    """A file that cannot be fetched; not the user's mistake. The message is one line: address, attempts, last cause."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server."""

    attempts: int = 6
    wait: float = 1.0
    """Seconds before the second attempt; each further wait is twice as long."""
    stall: float = 30.0
    """Seconds without a byte after which an attempt ends."""
    grace: float = 60.0
    """Seconds that an attempt may take beyond what `least_rate` allows for the received bytes."""
    least_rate: float = 32 * 1024
    """Bytes per second. A slower attempt ends, and the next one continues where it stopped."""


def require_address(address: str, allowed: list[str], where: str) -> None:
    """Raises UserError for anything but a plain address of an allowed protocol. The message never contains the address,
    which may hold a password.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    plain = re.fullmatch(r"[\w.:/~%+-]+", address.partition("://")[2].replace("@", ""))
    if parts.scheme not in PROTOCOLS or not parts.hostname or not plain:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise UserError(f"{where} is not an address such as https://HOST/FOLDER; it begins with {known}.")
    if parts.username or parts.password or "@" in address:
        raise UserError(f"{where} holds a user name or password, which logs would show. Use a credentials file.")
    if (scheme := parts.scheme) not in allowed:
        raise UserError(f"{where} begins with {scheme}://, which is not allowed. To allow it: data.remote=[{scheme}].")


def download(
    address: str, target: Path, *, patience: Patience, sha256: bytes | None = None, size: int | None = None
) -> None:
    """Fetch a whole file, continuing from the part that `target` already holds.

    Raises SourceError when the attempts are used up or the file is not the expected one, and UserError when a package
    is missing.
    """
    trouble = ""
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.wait * 2 ** (attempt - 1))
        try:
            expected = _append(address, target, size, patience)
            received = target.stat().st_size
            if expected is not None and received < expected:
                trouble = f"{received} of {expected} bytes came"
                continue
            if (expected is None or received == expected) and (sha256 is None or sha256.hex() == file_sha256(target)):
                return
            trouble = "it is not the file that was indexed: its size or checksum differs"
            target.unlink()
        except SourceError:
            raise
        except urllib.error.HTTPError as error:
            trouble = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code == 416:
                target.unlink(missing_ok=True)
            elif 300 <= error.code < 500 and error.code not in (408, 429):
                raise SourceError(f"{address}: {trouble}. Check the address and the right to read it.") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: a server that redirects to something that is not an address.
            trouble = " ".join(str(getattr(error, "reason", error) or type(error).__name__).split())
    raise SourceError(
        f"{address}: not fetched in {patience.attempts} attempts (the last: {trouble}). Check the server, then go on "
        "with resume=auto."
    )


@contextmanager
def _as_oserror() -> Iterator[None]:
    """botocore and aiohttp have their own exceptions for no connection, no credentials, a timeout."""
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException, UserError):
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from None


@_as_oserror()
def _append(address: str, target: Path, size: int | None, patience: Patience) -> int | None:
    """Read once, until the connection ends. Returns the size of the whole file, if known."""
    start = target.stat().st_size if target.is_file() else 0
    if size is not None and start >= size:
        return size
    begun, received = time.monotonic(), 0
    opened = _open_s3 if address.startswith("s3://") else _open_http
    body, start, announced = opened(address, start, patience.stall)
    expected = size if size is not None else announced
    with closing(body), target.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        # One byte more than expected proves that it is another file.
        left = (_MAX_UNKNOWN if expected is None else expected) + 1 - start
        read = getattr(body, "read1", body.read)
        while left > 0 and (chunk := read(min(_CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
            received += len(chunk)
            # By the received bytes: by the size of the file, an almost silent server would be allowed hours.
            if time.monotonic() - begun > patience.grace + received / patience.least_rate:
                raise TimeoutError(f"less than {patience.least_rate / 1024:.0f} KiB a second")
    return expected


def _open_http(address: str, start: int, stall: float) -> tuple[Any, int, int | None]:
    """The body from byte `start`, or from 0 if the server knows no ranges; where it begins; the whole file's size."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    response = urllib.request.build_opener(SameProtocols).open(request, timeout=stall)
    start = start if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    return response, start, start + int(length) if length is not None and length.isdigit() else None


class SameProtocols(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http(s) only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise urllib.error.HTTPError(req.full_url, 403, "redirected to another protocol", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_s3(address: str, start: int, stall: float) -> tuple[Any, int, int | None]:
    timeouts = {"connect_timeout": stall, "read_timeout": stall}
    return open_with_fsspec(address, start, protocol="s3", config_kwargs=timeouts)


def open_with_fsspec(address: str, start: int, *, protocol: str, **options: Any) -> tuple[Any, int, int | None]:
    """Like `_open_http`, for any file system of fsspec."""
    try:
        import fsspec

        # A new instance: a cached one may have been made before a fork.
        files = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except ImportError as error:
        remedy = "Run: pip install 'multidomain-cct[remote]'"
        raise UserError(f"{address}: {protocol} needs packages that are not installed ({error}). {remedy}") from None
    try:
        body = files.open(address, "rb", block_size=_PART)
        body.seek(start)
    except (FileNotFoundError, PermissionError) as error:
        trouble = "there is no such file" if isinstance(error, FileNotFoundError) else "it may not be read"
        raise SourceError(f"{address}: {trouble} ({error}). Check the address and the credentials.") from None
    return body, start, int(body.size)
