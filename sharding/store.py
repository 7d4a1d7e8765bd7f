"""Where the files of a corpus lie: a local folder, or a URL that fsspec reaches (s3, gs, http, https, ...).

A remote request that fails for a reason that may pass (connection, timeout, 5xx, 429, a body of the wrong
length or content) is tried again, after waits that double at random; each failure is logged with its reason.
What does not pass by itself (missing, denied, no credentials) ends at once in a StoreError.

Credentials come from where the packages look for them: environment, ``~/.aws``, ``~/.netrc``, fsspec's own
configuration, the instance's role. They are never taken from a URL, and never part of a message.
"""

import errno
import functools
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a request is tried again before the store counts as unreachable."""
MALFORMED_ATTEMPTS = 4
"""How often a body of the wrong length or content is accepted: it is rather wrong where it lies."""
TIMEOUT_S = 20.0
"""An attempt may take this long, plus the time of its bytes at SLOWEST_BYTES_PER_S."""
SLOWEST_BYTES_PER_S = 2**18
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
PIECE_BYTES = 2**23
"""Longer reads are several requests, so that a failure costs no more than this."""
REQUESTS_AT_ONCE = 16

# By name: the packages of stores that are not used need not be installed.
_PASSING = {
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("HTTPClientError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("ChunkedEncodingError", "TransportError"),  # requests, google.auth
}
_CHECKSUM_ERRORS = {"FlexibleChecksumError", "ChecksumError"}  # botocore, gcsfs
_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "GoogleAuthError",
}

T = TypeVar("T")


class StoreError(OSError):
    """A file of a store that cannot be read, for a reason that trying again does not mend."""


class Unreachable(StoreError):
    """A store that did not answer as it should for PATIENCE_S; its files may be whole."""


class _Malformed(Exception):
    """A body of the wrong length or content."""


@dataclass(frozen=True)
class Store:
    """A folder of files. Paths are relative to it, with forward slashes.

    Raises: StoreError for a URL with a user, a password or a query, which would end up in logs.
    """

    location: str
    """The folder or URL as it was given; safe to print."""

    def __post_init__(self) -> None:
        if not self.is_local:
            url = urlsplit(self.location)
            if "@" in url.netloc or url.query or url.fragment:
                host = url.netloc.rpartition("@")[2]
                raise StoreError(
                    errno.EINVAL,
                    f"{url.scheme}://{host}{url.path}: a corpus's URL holds no user, password, query or "
                    "fragment; give credentials by the environment, ~/.aws, ~/.netrc or fsspec's settings",
                )

    @property
    def name(self) -> str:
        """The last part of the location."""
        return (
            Path(self._folder).resolve().name if self.is_local else self.location.rstrip("/").split("/")[-1]
        )

    @property
    def is_local(self) -> bool:
        """Whether reading is cheap, so that nothing need be cached."""
        return re.match(r"(?!file:|local:)[A-Za-z][A-Za-z0-9+.-]*://", self.location) is None

    def read(
        self, path: str, offset: int = 0, count: int | None = None, check: Callable[[bytes], object] = len
    ) -> bytes:
        """``count`` bytes of a file from ``offset`` (all that follow, when None).

        At its end a local file gives fewer; a remote one that gives fewer is an error. ``check`` raises
        ValueError for content that is wrong: a remote file is read again, at last that error is raised.

        Raises: StoreError (an OSError) naming the file; Unreachable when its store does not answer.
        """
        if self.is_local:
            content = self._read_local(path, offset, count)
            check(content)
            return content
        if count is None or count <= PIECE_BYTES:
            return self._persist(path, lambda: self._read_remote(path, offset, count, check))
        starts = range(offset, offset + count, PIECE_BYTES)
        content = b"".join(self.read(path, at, min(PIECE_BYTES, offset + count - at)) for at in starts)
        check(content)
        return content

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Size of each file in bytes; None for one that is not there. Raises: StoreError, see ``read``."""
        size = self._local_size if self.is_local else self._remote_size
        with ThreadPoolExecutor(1 if self.is_local else REQUESTS_AT_ONCE) as pool:
            return list(pool.map(size, paths))

    @property
    def _folder(self) -> str:
        return re.sub(r"^(file|local)://", "", self.location)

    def _read_local(self, path: str, offset: int, count: int | None) -> bytes:
        full = os.path.join(self._folder, path)
        try:
            descriptor = os.open(full, os.O_RDONLY)
            try:
                wanted = os.fstat(descriptor).st_size - offset if count is None else count
                return os.pread(descriptor, wanted, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(error.errno, f"{full}: {error.strerror}") from error

    def _local_size(self, path: str) -> int | None:
        try:
            return os.stat(os.path.join(self._folder, path)).st_size
        except OSError:
            return None

    def _read_remote(
        self, path: str, offset: int, count: int | None, check: Callable[[bytes], object]
    ) -> bytes:
        """One attempt."""
        limits = {} if count is None else {"start": offset, "end": offset + count}
        try:
            content = self._call("cat_file", path, PIECE_BYTES if count is None else count, **limits)
        except Exception as error:
            if type(error).__name__ in _CHECKSUM_ERRORS:
                raise _Malformed(str(error)) from None
            raise
        if count is None:
            content = content[offset:]
        elif len(content) > count and len(content) >= offset + count:
            _warn_of_no_ranges(self.location)  # the whole file came; were it anything else, checksums tell
            content = content[offset : offset + count]
        elif len(content) != count:
            raise _Malformed(f"{len(content)} bytes came, not {count}")
        try:
            check(content)
        except ValueError as error:
            raise _Malformed(str(error)) from error
        return content

    def _remote_size(self, path: str) -> int | None:
        try:
            size = self._persist(path, lambda: self._call("info", path, 0)["size"])
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        if size is None:
            raise StoreError(
                errno.EIO,
                f"{self.location}/{path}: the server does not tell its size; serve it as a plain file",
            )
        return size

    def _call(self, method: str, path: str, count: int, **arguments: Any) -> Any:
        """A method of the file system, for at most the time that ``count`` bytes may take."""
        system, root = _file_system(self.location, os.getpid())
        full = f"{root.rstrip('/')}/{path}"
        if not system.async_impl:
            return getattr(system, method)(full, **arguments)
        timeout = TIMEOUT_S + count / SLOWEST_BYTES_PER_S
        return sync(system.loop, getattr(system, f"_{method}"), full, timeout=timeout, **arguments)

    def _persist(self, path: str, attempt: Callable[[], T]) -> T:
        """The result of an attempt, tried again while it fails for a reason that may pass."""
        url = f"{self.location.rstrip('/')}/{path}"

        def report(state: RetryCallState) -> None:
            assert state.outcome is not None and state.next_action is not None
            reason, wait_s = _reason(state.outcome.exception()), state.next_action.sleep
            log.warning("%s: attempt %d: %s; again in %.1f s", url, state.attempt_number, reason, wait_s)

        start = time.monotonic()
        retrying = Retrying(
            retry=retry_if_exception(_may_pass), stop=_enough, wait=_wait, before_sleep=report, reraise=True
        )
        try:
            return retrying(attempt)
        except StoreError:
            raise
        except Exception as error:
            # Without the chain: it may carry signed URLs.
            raise _final(url, error, time.monotonic() - start) from None


@functools.cache
def _file_system(location: str, process: int) -> tuple[Any, str]:
    """The file system of a URL and the path in it; per process, as its event loop does not survive a fork.

    Packages' own silent retries are off: every failure is to be seen.
    """
    try:
        system, root = fsspec.core.url_to_fs(location, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        scheme = location.split("://")[0]
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(scheme)
        hint = f": `pip install tinybert-at-scale[{extra}]`" if extra else ""
        raise StoreError(errno.ENOSYS, f"{location}: a package is missing ({error}){hint}") from error
    except ValueError as error:
        raise StoreError(errno.ENOSYS, f"{location}: {error}") from error
    if "s3" in system.protocol:
        system.retries = 1
        system.config_kwargs = {"retries": {"total_max_attempts": 1}, **system.config_kwargs}
    elif "http" in system.protocol:
        # Compression would undo byte ranges. The environment names proxies, ~/.netrc credentials.
        headers = {"Accept-Encoding": "identity"}
        system.client_kwargs = {"trust_env": True, "headers": headers, **system.client_kwargs}
    return system, root


@functools.cache
def _warn_of_no_ranges(location: str) -> None:
    log.warning("%s: the server ignores byte ranges, so that each block costs a whole shard", location)


def _links(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: BaseException | None) -> tuple[int | None, dict[str, str]]:
    """HTTP status and headers that an error of botocore, aiohttp or gcsfs speaks of."""
    for link in _links(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            metadata = response.get("ResponseMetadata", {})
            return metadata.get("HTTPStatusCode"), metadata.get("HTTPHeaders") or {}
        # By class: what aiohttp's parser raises has a code too, which no server sent.
        attribute = {"ClientResponseError": "status", "HttpError": "code"}.get(type(link).__name__)
        if attribute is not None and str(status := getattr(link, attribute)).isdigit():
            headers = getattr(link, "headers", None) or {}
            return int(status), {key.lower(): text for key, text in headers.items()}
    return None, {}


def _may_pass(error: BaseException) -> bool:
    links = list(_links(error))
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in links):
        return False
    if any(isinstance(link, _Malformed | ConnectionError | TimeoutError | FSTimeoutError) for link in links):
        return True
    status, _ = _response(error)
    if status is not None:
        return status in (408, 425, 429) or (status >= 500 and status != 501)
    return any(kind.__name__ in _PASSING for link in links for kind in type(link).__mro__)


def _enough(state: RetryCallState) -> bool:
    assert state.outcome is not None
    if isinstance(state.outcome.exception(), _Malformed) and state.attempt_number >= MALFORMED_ATTEMPTS:
        return True
    return (state.seconds_since_start or 0) >= PATIENCE_S


def _wait(state: RetryCallState) -> float:
    """Seconds before the next attempt: as the server asks, or at random up to 1, 2, 4, ... s; at most 30."""
    assert state.outcome is not None
    _, headers = _response(state.outcome.exception())
    asked = headers.get("retry-after", "")
    own = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)
    return min(max(own, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT_S)


def _reason(error: BaseException | None) -> str:
    """What went wrong in one line, without queries and users of URLs: they may be signatures."""
    status, _ = _response(error)
    if isinstance(error, FSTimeoutError):
        return "no complete answer in time"
    text = re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split())))[:300]
    kind = "" if isinstance(error, _Malformed) else f"{type(error).__name__}: "
    return (f"HTTP {status}: " if status is not None else "") + f"{kind}{text}"


def _final(url: str, error: Exception, seconds: float) -> Exception:
    """The error that ends a request."""
    status, _ = _response(error)
    names = {kind.__name__ for link in _links(error) for kind in type(link).__mro__}
    if isinstance(error, _Malformed):
        return (
            error.__cause__
            if isinstance(error.__cause__, Exception)
            else StoreError(errno.EIO, f"{url}: {error}")
        )
    if _may_pass(error):
        return Unreachable(
            errno.ETIMEDOUT, f"{url}: no whole answer for {seconds:.0f} s, at last: {_reason(error)}"
        )
    if status in (401, 403) or isinstance(error, PermissionError) or names & _CREDENTIALS:
        return StoreError(
            errno.EACCES,
            f"{url}: access denied ({_reason(error)}); credentials are taken from the environment, ~/.aws, "
            "~/.netrc, fsspec's settings and the instance's role; a public bucket wants "
            "FSSPEC_S3_ANON=true or FSSPEC_GS_TOKEN=anon",
        )
    if status == 404 or isinstance(error, FileNotFoundError):
        return StoreError(errno.ENOENT, f"{url}: there is no such file (or bucket)")
    return StoreError(errno.EIO, f"{url}: {_reason(error)}")
