"""The bytes of a recording, wherever a request says they are: in it, at an `https:` address, in an object store.

An address of a request makes this server open connections for a stranger. So nothing but `data:` is taken unless a
list allows it, and even then a name is resolved first, by us, and every address it has must be public (no private,
loopback, link-local or otherwise special one, however it is written); the connection goes to exactly the addresses that
were checked, at each redirect anew. Errors are in general words: an answer must not map the network.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from af2_ray.config import Serve
from af2_ray.storage.places import NameRefused, allow, locate
from serve_apps.admission import Hold
from serve_apps.limits import decode_base64
from serve_apps.schemas import ApiError, AudioUrl, InputAudio

MAX_REDIRECTS = 3
TIMEOUT_S = 20.0
_GLOBAL, _DOCUMENTS = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("3fff::/20")
_STORE_THREADS = 8
_COPIES = 2  # of what is fetched: itself, and the message to a decoder
Lookup = Callable[[str, int], Awaitable[list[str]]]


def _hold_nothing(num_bytes: int) -> None:
    """Memory that is not counted."""


class Fetcher:
    """Gets recordings.

    Args:
        hosts: host names that `https:` may go to, `*.example.org` for those below a name, `*` for any public one.
        prefixes: `s3://bucket/folder/` and the like that may be read.
        max_bytes: size of a recording at most.
        lookup: addresses of a host and port.
    """

    def __init__(
        self, hosts: Sequence[str], prefixes: Sequence[str], max_bytes: int, lookup: Lookup | None = None
    ) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._prefixes = [prefix if prefix.endswith("/") else prefix + "/" for prefix in prefixes]
        self._max_bytes, self._lookup = max_bytes, lookup or _lookup
        # Threads of its own: a store that hangs stops nobody who sends the recording itself.
        self._threads = ThreadPoolExecutor(_STORE_THREADS, "store")

    @classmethod
    def of(cls, serve: Serve) -> Fetcher:
        """As a recipe's `serve` block allows; what may be read may be opened."""
        allow([prefix.partition("://")[0] for prefix in serve.audio_url_prefixes])
        return cls(serve.audio_url_hosts, serve.audio_url_prefixes, serve.max_body_mb * 2**20)

    async def read_all(self, audios: Sequence[InputAudio | AudioUrl], hold: Hold = _hold_nothing) -> list[bytes]:
        """The bytes of all recordings of a request, fetched at the same time; the first error ends them all."""
        tasks = [asyncio.create_task(self.read(audio, f"audio {n + 1}", hold)) for n, audio in enumerate(audios)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def read(self, audio: InputAudio | AudioUrl, name: str, hold: Hold = _hold_nothing) -> bytes:
        """The bytes of one recording; `ApiError` 4xx says what is wrong with `name`.

        Args:
            hold: function that takes memory for what is fetched.
        """
        if isinstance(audio, InputAudio):
            return await asyncio.to_thread(decode_base64, audio.data, name)
        url = audio.url
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(decode_base64, url, name)
        if scheme == "https" and self._hosts:
            return await self._download(url, name, hold)
        if any(url.startswith(prefix) for prefix in self._prefixes):
            return await self._object(url, name, hold)
        raise _refused(f"{name}: this server fetches no such address: send the recording itself (input_audio)")

    # --- https ---------------------------------------------------------------------------------------------------

    async def _download(self, url: str, name: str, hold: Hold) -> bytes:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(resolver=_Checked(self._lookup), use_dns_cache=False)
        try:
            async with aiohttp.ClientSession(
                connector=connector, timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
            ) as session:
                for _ in range(MAX_REDIRECTS + 1):
                    self.check_url(url, name)
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308):
                            url = urljoin(url, response.headers.get("location", ""))
                            continue
                        if response.status != 200:
                            raise _failed(f"{name}: its address answers with status {response.status}")
                        return await self._body(response, name, hold)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _failed(f"{name}: its address cannot be fetched: check it, or send the recording itself") from error
        raise _failed(f"{name}: its address redirects more than {MAX_REDIRECTS} times")

    async def _body(self, response: aiohttp.ClientResponse, name: str, hold: Hold) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_chunked(2**16):
            hold(_COPIES * len(chunk))
            data += chunk
            if len(data) > self._max_bytes:
                raise _too_large(name, self._max_bytes)
        return bytes(data)

    def check_url(self, url: str, name: str) -> None:
        """`ApiError` 400 unless `url` is plain `https:` to a host of the list, or an address that is public."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise _refused(f"{name}: its address is none") from error
        if parts.scheme != "https" or not host or parts.username or parts.password or re.search(r"[\s\\]", url):
            raise _refused(f"{name}: its address must be plain https, without a user name")
        if not host.isascii():  # its other spelling (IDNA) may be an address
            raise _refused(f"{name}: its host must be written in ASCII (xn--...)")
        if port not in (None, 443):
            raise _refused(f"{name}: its address names a port: only 443 is fetched")
        allowed = any(
            rule in ("*", host) or (rule.startswith("*.") and host.endswith(rule[1:])) for rule in self._hosts
        )
        if not allowed:
            raise _refused(f"{name}: this server fetches nothing from that host: send the recording itself")
        try:  # a literal address is connected to without asking the resolver
            is_open = is_public(host)
        except ValueError:  # a name, unless it is an address in one of the other spellings (2130706433, 0x7f.1)
            is_open = re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]) is None
        if not is_open:
            raise _refused(f"{name}: this server fetches nothing from that host: send the recording itself")

    # --- Object stores -------------------------------------------------------------------------------------------

    async def _object(self, uri: str, name: str, hold: Hold) -> bytes:
        if ".." in uri or any(mark in uri for mark in "?#*\\%"):
            raise _refused(f"{name}: its address must be plain, without '..' or wildcards")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                fs, path = await loop.run_in_executor(self._threads, locate, uri)
                size = int((await loop.run_in_executor(self._threads, fs.info, path))["size"])
                if size > self._max_bytes:
                    raise _too_large(name, self._max_bytes)
                hold(_COPIES * size)
                read: Callable[[], bytes] = partial(fs.cat_file, path, start=0, end=size)
                data = await loop.run_in_executor(self._threads, read)
        except ApiError:
            raise
        except NameRefused as error:
            raise _refused(f"{name}: its address must be plain: {error.reason}") from error
        except Exception as error:  # each store's client has errors of its own
            raise _failed(f"{name}: the object cannot be read: check its address") from error
        return data


class _Checked(AbstractResolver):
    """Resolves names to addresses that are all public, or to none."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = await self._lookup(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise OSError("not a public address")
        return [_result(host, address, port) for address in addresses]

    async def close(self) -> None:
        """Nothing is held."""


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    numeric: Any = socket.AI_NUMERICHOST
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=numeric)


async def _lookup(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an address, IPv4 or IPv6, belongs to the open internet; one that wraps another is judged by that too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _GLOBAL or ip in _DOCUMENTS:  # what Python calls global has gaps (::/96, fec0::/10, 5f00::/16)
            return False
    return ip.is_global and not ip.is_multicast


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="audio_url_not_allowed", param="messages")


def _failed(message: str) -> ApiError:
    return ApiError(400, message, code="audio_url_failed", param="messages")


def _too_large(name: str, max_bytes: int) -> ApiError:
    return ApiError(
        413, f"{name}: larger than {max_bytes // 2**20} MiB: send a shorter stretch", code="audio_too_large"
    )
