"""Who may ask, how often, and where a recording may be fetched from."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from serve_apps.admission import Memory
from serve_apps.fetch import Fetcher, _Checked, is_public
from serve_apps.keys import ANYONE, Keys, KeySource
from serve_apps.schemas import ApiError, AudioUrl, InputAudio


def keys_of(*keys: str, per_minute: int = 0, clock: Callable[[], float] = time.monotonic) -> Keys:
    source = KeySource(tuple(hashlib.sha256(key.encode()).digest() for key in keys))
    return Keys([source], per_minute, clock)


def refused(keys: Keys, header: str | None) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        keys.take(header)
    return caught.value.status, caught.value.code


def test_keys() -> None:
    keys = keys_of("first", "second")
    keys.take("Bearer first")
    keys.take("bearer second")
    assert refused(keys, None) == (401, "missing_api_key")
    assert refused(keys, "first") == (401, "missing_api_key")
    assert refused(keys, "Bearer ") == (401, "missing_api_key")
    assert refused(keys, "Bearer firs") == (401, "invalid_api_key")
    assert refused(keys, "Basic first") == (401, "missing_api_key")
    assert keys_of().take(None) == ANYONE


def test_each_key_has_a_rate_of_its_own() -> None:
    now = [0.0]
    keys = keys_of("a", "b", per_minute=2, clock=lambda: now[0])
    for _ in range(2):
        keys.take("Bearer a")
    with pytest.raises(ApiError) as caught:
        keys.take("Bearer a")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 30)
    assert caught.value.body()["error"]["type"] == "rate_limit_error"
    keys.take("Bearer b")
    now[0] = 30.0
    keys.take("Bearer a")
    assert refused(keys, "Bearer a") == (429, "rate_limit_exceeded")


def test_eight_answers_count_as_eight() -> None:
    now = [0.0]
    keys = keys_of("a", per_minute=10, clock=lambda: now[0])
    who = keys.take("Bearer a")
    keys.count(who, 7)
    with pytest.raises(ApiError) as caught:
        keys.count(who, 7)
    assert caught.value.retry_after_s == 30
    now[0] = 30.0
    keys.count(who, 7)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without keys."""
    for variable in ("AF2_API_KEYS", "AF2_API_KEYS_FILE"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def from_environment(*sources: KeySource, clock: Callable[[], float] = time.monotonic) -> Keys:
    return Keys([*sources, KeySource.of_environment()], 0, clock)


def test_keys_of_the_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert from_environment().is_open
    environment.setenv("AF2_API_KEYS", "one, two")
    from_environment().take("Bearer two")
    given = KeySource.of_environment()
    environment.delenv("AF2_API_KEYS")
    with pytest.raises(ApiError, match="no API key"):
        from_environment(given).take(None)  # of the process that deploys: the replica's has none
    from_environment(given).take("Bearer one")
    environment.setenv("AF2_API_KEYS", "one, two")
    secret = tmp_path / "keys"
    secret.write_text("three\n\n")
    environment.setenv("AF2_API_KEYS_FILE", str(secret))
    keys = from_environment()
    keys.take("Bearer one")
    keys.take("Bearer three")
    environment.delenv("AF2_API_KEYS")
    secret.write_text("\n")
    with pytest.raises(ValueError, match="without keys"):
        from_environment()
    environment.setenv("AF2_API_KEYS_FILE", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot be read"):
        from_environment()


def test_a_key_that_no_header_carries_is_refused_when_it_is_set(environment: pytest.MonkeyPatch) -> None:
    for key in ("schlüssel", "two words", "bell\x07"):
        environment.setenv("AF2_API_KEYS", key)
        with pytest.raises(ValueError, match="AF2_API_KEYS: a key has letters that no header carries"):
            KeySource.of_environment()


def test_keys_are_added_and_revoked_without_a_new_server(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now, secret = [0.0], tmp_path / "keys"
    secret.write_text("old")
    environment.setenv("AF2_API_KEYS_FILE", str(secret))
    deployed = KeySource.of_environment()
    keys = from_environment(deployed, clock=lambda: now[0])
    keys.take("Bearer old")
    secret.write_text("newer")
    now[0] = 2.0
    keys.take("Bearer newer")
    assert refused(keys, "Bearer old") == (401, "invalid_api_key")
    secret.write_text("")  # by mistake: nobody is let in whom the file did not name, and nobody is locked out
    now[0] = 4.0
    keys.take("Bearer newer")
    secret.unlink()
    now[0] = 6.0
    keys.take("Bearer newer")
    assert refused(keys, None) == (401, "missing_api_key")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("fec0::1", False),
        ("64:ff9b:1::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100:0:0:1::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def read(fetcher: Fetcher, url: str) -> bytes:
    return asyncio.run(fetcher.read(AudioUrl(url=url), "audio 1"))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.wav",
        "https://elsewhere.net/a.wav",
        "https://example.org.evil.net/a.wav",
        "https://user:word@example.org/a.wav",
        "https://example.org@elsewhere.net/a.wav",
        "https://example.org:8443/a.wav",
        "https://example.org\\@elsewhere.net/",
        "https://example.org/a\r\nHost: x",
        "https:///a.wav",
        "https://[::1/a.wav",
        "file:///etc/passwd",
        "ftp://example.org/a.wav",
        "gopher://example.org/",
        "s3://private/a.wav",
        "memory://public/../private/a.wav",
        "memory://public/%2e%2e/private/a.wav",
        "memory://publicity/a.wav",
    ],
)
def test_addresses_that_are_not_fetched(url: str) -> None:
    fetcher = Fetcher(["example.org", "*.good.org"], ["memory://public"], 1000)
    with pytest.raises(ApiError) as caught:
        read(fetcher, url)
    assert caught.value.status == 400
    assert caught.value.code == "audio_url_not_allowed"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "169.254.169.254", "[::ffff:10.0.0.1]", "2130706433", "0x7f.1", "localhost", "１２７.0.0.1"],
)
def test_no_host_leads_inside(host: str) -> None:
    """Where any public host is allowed: literal, mapped, decimal and hexadecimal addresses, and a local name."""
    with pytest.raises(ApiError) as caught:
        read(Fetcher(["*"], [], 1000), f"https://{host}/a.wav")
    assert (caught.value.status, caught.value.code) == (
        400,
        f"audio_url_{'failed' if host == 'localhost' else 'not_allowed'}",
    )
    assert "127" not in caught.value.message.replace(host, "")


def test_a_name_that_leads_inside_is_not_connected_to() -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return {"inside": ["10.0.0.5"], "mixed": ["8.8.8.8", "127.0.0.1"], "none": [], "good": ["8.8.8.8"]}[host]

    resolver = _Checked(lookup)
    for host in ("inside", "mixed", "none"):
        with pytest.raises(OSError, match="not a public address"):
            asyncio.run(resolver.resolve(host, 443))
    assert [found["host"] for found in asyncio.run(resolver.resolve("good", 443))] == ["8.8.8.8"]


@pytest.mark.parametrize(
    "location",
    ["https://127.0.0.1/a.wav", "https://2130706433/", "http://good.org/a.wav", "file:///etc/passwd", "//in/"],
)
def test_a_redirect_is_checked_as_the_first_address_was(monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    asked = []

    class Elsewhere:
        status, headers = 302, {"location": location}

        async def __aenter__(self) -> Elsewhere:
            return self

        async def __aexit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr("aiohttp.ClientSession.get", lambda _, url, **__: asked.append(url) or Elsewhere())
    with pytest.raises(ApiError) as caught:
        read(Fetcher(["good.org"], [], 1000), "https://good.org/a.wav")
    assert (caught.value.status, caught.value.code) == (400, "audio_url_not_allowed")
    assert asked == ["https://good.org/a.wav"]


def test_a_store_that_hangs_holds_nothing_for_who_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    store, go_on = fsspec.filesystem("memory"), threading.Event()
    store.pipe_file("/slow/a.wav", b"stored")
    real = type(store).info
    monkeypatch.setattr(type(store), "info", lambda *args, **more: go_on.wait(10) and real(*args, **more))
    fetcher, memory = Fetcher([], ["memory://slow"], 1000), Memory(1000)

    async def run() -> None:
        with memory.holding() as hold, pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await fetcher.read_all([AudioUrl(url="memory://slow/a.wav")] * 4, hold)
        go_on.set()
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert memory.held == 0


def test_what_is_in_the_request_or_in_an_allowed_store() -> None:
    fetcher = Fetcher([], ["memory://public"], 1000)
    text = base64.b64encode(b"audio").decode()
    assert read(fetcher, f"data:audio/wav;base64,{text}") == b"audio"
    assert asyncio.run(fetcher.read(InputAudio(data=text, format="wav"), "audio 1")) == b"audio"
    store = fsspec.filesystem("memory")
    store.pipe_file("/public/a.wav", b"stored")
    store.pipe_file("/public/big.wav", bytes(1001))
    assert read(fetcher, "memory://public/a.wav") == b"stored"
    with pytest.raises(ApiError) as caught:
        read(fetcher, "memory://public/big.wav")
    assert caught.value.status == 413
    with pytest.raises(ApiError, match="cannot be read"):
        read(fetcher, "memory://public/nothing.wav")
