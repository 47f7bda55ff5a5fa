"""Shards behind a URL: http(s) and what fsspec knows (s3, gs, ...), with one retry policy for all of them."""

import errno
import logging
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies_environment

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.http import HTTPFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from iccld.data.storage.base import (
    MissingShard,
    Storage,
    StorageConfig,
    StorageError,
    Unreachable,
    short_read,
)
from iccld.redact import secrets_in, without_known, without_secrets

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

FIRST_WAIT_S, MAX_WAIT_S = 0.2, 10.0
LOUD_ATTEMPT = 5
"""The failed attempt at one read that is logged: earlier ones are usual, and later ones say the same."""
BUSY_STATUSES = {408, 425, 429}
MAX_REDIRECTS = 5
PUBLIC_OPTIONS = ("anon", "endpoint_url", "profile", "requester_pays", "use_ssl")
"""Options that messages may show, as far as they are no URL with a password."""
MAX_SAID = 300
"""The most characters of a server's words in a message."""
FINAL_ERRNOS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.EPERM)}
FINAL_ERRORS = (StorageError, FileNotFoundError, PermissionError, TypeError, ValueError, AttributeError, ImportError)
# By name, since their packages may be missing.
FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}

_KEPT_OPEN: list[AsyncFileSystem] = []
"""All storages of this process and its parents; a parent's, if collected here, would end its connections."""


def open_remote(location: str, config: StorageConfig) -> "RemoteStorage":
    """Open the storage at a URL. Raises ValueError if no installed package reads it."""
    scheme, host = location.partition("://")[0].lower(), location.partition("://")[2].strip("/")
    if not host:
        raise ValueError(f"{scheme}:// names no server or bucket; write it as {scheme}://NAME/folder.")
    if scheme in ("http", "https"):
        _check_url(location)
        return HTTPStorage(location, config)
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{without_secrets(location)} cannot be read: {_said(error)}; check the scheme.") from error
    return (S3Storage if scheme in ("s3", "s3a") else RemoteStorage)(location, config)


def _check_url(location: str) -> None:
    try:
        _ = urlsplit(location).port
    except ValueError:  # its message would show a password that holds an unencoded / ? # or @
        raise ValueError(
            f"{without_secrets(location)}: the URL given is none; write / ? # @ : of a user or password as %2F %3F %23 "
            f"%40 %3A, or put them into ~/.netrc."
        ) from None


class RemoteStorage(Storage):
    """Storage that fsspec opens by the URL's scheme. Each process makes its own: none survives a fork."""

    is_local = False
    piece_bytes = 8 << 20

    def __init__(self, location: str, config: StorageConfig) -> None:
        super().__init__(location.rstrip("/"))
        self.config = config
        self._filesystems: dict[int, AsyncFileSystem] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystems": {}}

    def _read(self, name: str, offset: int, size: int) -> bytes:
        what = f"{self.describe(name)}: bytes {offset}-{offset + size - 1}"
        return self._ask(lambda filesystem: self._fetch(filesystem, name, offset, size), what)

    def _size(self, name: str) -> int:
        return self._ask(lambda filesystem: self._fetch_size(filesystem, name), f"{self.describe(name)}: its size")

    async def _fetch(self, filesystem: Any, name: str, offset: int, size: int) -> bytes:
        try:
            data = await self._fetch_range(filesystem, name, offset, size)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a range beyond the end, among other things
                await self._check_end(filesystem, name, offset, size)
            raise
        if len(data) > size:
            raise StorageError(f"{self.describe(name)}: the server ignores byte ranges; {_SERVE_RANGES}.")
        if len(data) < size:
            await self._check_end(filesystem, name, offset, size)
            raise ConnectionError(f"the answer ends after {len(data)} of {size} bytes")
        return data

    async def _fetch_range(self, filesystem: Any, name: str, offset: int, size: int) -> bytes:
        return await filesystem._cat_file(self._address(name), start=offset, end=offset + size)

    async def _check_end(self, filesystem: Any, name: str, offset: int, size: int) -> None:
        total = await self._fetch_size(filesystem, name)
        if total < offset + size:
            raise short_read(self.describe(name), offset, size, total)

    async def _fetch_size(self, filesystem: Any, name: str) -> int:
        info = await filesystem._info(self._address(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(self._address(name))
        return int(info["size"])

    def _ask(self, request: Callable[[Any], Awaitable[Answer]], what: str) -> Answer:
        """Return the answer to a request, after as many attempts as the configuration allows."""
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_before_delay(self.config.retry_for_s),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S),
            before_sleep=lambda state: self._count_retry(state, what),
            reraise=True,
        )
        try:
            return retrying(self._ask_once, request)
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise MissingShard(f"{what.partition(': ')[0]} does not exist") from error
        except PermissionError as error:
            raise StorageError(
                f"{what}: access is denied ({self._said(str(error))}); check the credentials."
            ) from error
        except Exception as error:
            attempts = retrying.statistics["attempt_number"]
            tried = f"failed after {attempts} attempts" if attempts > 1 else "failed"
            raise (Unreachable if _may_pass(error) else StorageError)(
                f"{what}: {tried} ({self._said(error)}); check the server, the URL and data.storage."
            ) from error

    def _ask_once(self, request: Callable[[Any], Awaitable[Any]]) -> Any:
        self.counters.add(requests=1)
        filesystem, limit = self._filesystem(), self.config.timeout_s
        try:
            return sync(filesystem.loop, request, filesystem, timeout=limit)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {limit:g} s") from error

    def _count_retry(self, state: RetryCallState, what: str) -> None:
        self.counters.add(retries=1)
        if state.attempt_number == LOUD_ATTEMPT and state.outcome is not None:
            cause = self._said(state.outcome.exception())
            logger.warning("%s: attempt %d failed (%s); retrying.", what, LOUD_ATTEMPT, cause)

    def _said(self, error: BaseException | str | None) -> str:
        """Put an error into one line, without the secrets of location and options."""
        options = (value for name, value in self.config.options.items() if name not in PUBLIC_OPTIONS)
        said = without_known(_said(error), secrets_in(self.location).union(options))
        return re.sub(r"\?[^\s)]+", "", said)  # a server may name any URL, with any query

    def _filesystem(self) -> AsyncFileSystem:
        process = os.getpid()
        if process not in self._filesystems:  # if two threads open one at once, both use the first
            filesystem = self._filesystems.setdefault(process, self._open_filesystem())
            _KEPT_OPEN.append(filesystem)
        return self._filesystems[process]

    def _open_filesystem(self) -> AsyncFileSystem:
        scheme = self.location.partition("://")[0].lower()
        words = {"true": True, "false": False}
        options: dict[str, Any] = {name: words.get(text.lower(), text) for name, text in self.config.options.items()}
        if scheme in ("s3", "s3a"):  # botocore and s3fs must not retry within our attempts
            limits = {"connect_timeout": self.config.timeout_s, "read_timeout": self.config.timeout_s}
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **limits}
        filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        if not filesystem.async_impl:
            return AsyncFileSystemWrapper(filesystem, asynchronous=False)
        filesystem.retries = 1
        return filesystem


class S3Storage(RemoteStorage):
    """Object store that speaks S3. An answer's length is checked before its body is read."""

    async def _fetch_range(self, filesystem: Any, name: str, offset: int, size: int) -> bytes:
        bucket, key, _ = filesystem.split_path(self._address(name))
        wanted = f"bytes={offset}-{offset + size - 1}"
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted)
        try:
            length = answer.get("ContentLength")
            if length is None or length > size:
                raise StorageError(f"{self.describe(name)}: the server ignores byte ranges; {_SERVE_RANGES}.")
            return await answer["Body"].read()
        finally:
            answer["Body"].close()


class HTTPStorage(RemoteStorage):
    """Web server, read by byte ranges. An answer's headers are checked before its body is read."""

    def _address(self, name: str) -> str:
        parts = urlsplit(self.location)  # a query, such as a signature, stays behind the name, unchanged
        folder = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        return parts._replace(path=f"{folder}/{quote(name)}").geturl()

    def _open_filesystem(self) -> AsyncFileSystem:
        # Looking for proxies and ~/.netrc takes as long as a request, so it is done only if there are any.
        netrc = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # noqa: PTH111  (a user may have no home)
        trust_env = bool(getproxies_environment()) or Path(netrc).is_file()
        client = {"trust_env": trust_env, "timeout": aiohttp.ClientTimeout(total=self.config.timeout_s)}
        client["auto_decompress"] = False  # a few compressed bytes may expand to any number
        return HTTPFileSystem(client_kwargs=client, encoded=True, skip_instance_cache=True)

    async def _fetch(self, filesystem: Any, name: str, offset: int, size: int) -> bytes:
        place = self.describe(name)
        async with await self._get(filesystem, name, offset, size) as response:
            first, total = _content_range(response)
            if total is not None and total < offset + size:
                raise short_read(place, offset, size, total)
            whole = response.status == 200 and offset == 0 and total == size
            if response.status == 200 and not whole:
                raise StorageError(
                    f"{place}: the server ignores byte ranges (it sends the whole file); {_SERVE_RANGES}."
                )
            if not whole and (first != offset or (response.content_length or size) != size):
                answered = response.headers.get("Content-Range", "none named")[:80]
                raise StorageError(f"{place}: the server answers with other bytes ({answered!r}) than were asked for.")
            return await response.content.readexactly(size)

    async def _fetch_size(self, filesystem: Any, name: str) -> int:
        # GET: a signed URL may allow nothing else.
        async with await self._get(filesystem, name, 0, 1) as response:
            _, total = _content_range(response)
            if total is None:
                raise StorageError(f"{self.describe(name)}: the server does not say how large it is; {_SERVE_RANGES}.")
            return total

    async def _get(self, filesystem: Any, name: str, offset: int, size: int) -> aiohttp.ClientResponse:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        session: aiohttp.ClientSession = await filesystem.set_session()
        url = filesystem.encode_url(self._address(name))
        place = self.describe(name)
        try:
            response = await session.get(url, headers=headers, max_redirects=MAX_REDIRECTS)
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:  # the address it leads to may hold a secret
            why = type(error).__name__
            raise StorageError(f"{place}: a redirect of the server is not followed ({why}); give its URL.") from None
        kind = response.headers.get("Content-Encoding", "identity").lower()
        encrypted = [hop.url.scheme == "https" for hop in (*response.history, response)]
        if response.status in (200, 206, 416) and kind == "identity" and encrypted == sorted(encrypted):
            return response
        response.close()
        if encrypted != sorted(encrypted):
            raise StorageError(
                f"{place}: the server leads from https to http, which anyone can read; mend its redirect."
            )
        if response.status in (200, 206):
            raise StorageError(f"{place}: the server compresses ({kind[:20]!r}); serve the shards as they are.")
        raise _error_of(response.status, f"{response.status} {response.reason}", place)


_SERVE_RANGES = "serve the shards by one that supports them, such as nginx or an object store"


def _error_of(status: int, answer: str, place: str) -> OSError:
    if status in (404, 410):
        return FileNotFoundError(answer)
    if status in (401, 403, 407):
        return PermissionError(answer)
    if status in BUSY_STATUSES or status >= 500:
        return ConnectionError(f"the server answered {answer}")
    return StorageError(f"{place}: the server answered {_said(answer)}; check the URL.")


def _content_range(response: aiohttp.ClientResponse) -> tuple[int | None, int | None]:
    """Return the first byte and the whole file's length, as far as the answer says them."""
    if response.status == 200:
        return 0, response.content_length
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("Content-Range", ""))
    first, total = found.groups() if found else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _may_pass(error: BaseException) -> bool:
    """Tell whether another attempt may succeed. Lists final errors: packages add errors of their own."""
    final = isinstance(error, FINAL_ERRORS) or type(error).__name__ in FINAL_NAMES or not isinstance(error, Exception)
    return not final and not (isinstance(error, OSError) and error.errno in FINAL_ERRNOS)


def _said(said: BaseException | str | None) -> str:
    """Put the words of an error or of a server into one short, printable line."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(said))
    text = " ".join(text.split())[:MAX_SAID]
    if isinstance(said, str):
        return text
    return f"{type(said).__name__}: {text}" if text else type(said).__name__
