"""Fetches files for strangers: from named hosts alone, and from no address that only this machine's network sees.

A name is looked up once. Every address that it has is checked, and the connection goes to an address that was checked,
so that a name cannot point elsewhere a moment later. Redirects are followed by hand, each checked anew.
"""

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

_MOST_REDIRECTS = 5
_LONGEST_URL = 8192
_SILENCE_SECONDS = 20.0  # that a connection may keep
_PORTS = {"http": 80, "https": 443}
# A cloud machine's secrets over IPv6 and at another cloud, and a whole network.
_NEVER = tuple(map(ipaddress.ip_address, ("fd00:ec2::254", "168.63.129.16", "255.255.255.255")))
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SourceError(ValueError):
    """A file cannot be had; the message is for whoever asked."""


class TooLargeError(SourceError):
    """A file is larger than is taken."""


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched.

    Args:
        hosts: names that files may come from: "example.org", "*.example.org" for all below it, "example.org:8080" where
            it is not the port that http or https has; none for no fetching.
        private: also from addresses that only this network sees. For files on a server of one's own.
        max_bytes: of a file.
        seconds: that a file may take, redirects and all.
        ca_file: certificates (PEM) that are trusted beside the machine's, for servers of one's own.
    """

    hosts: tuple[str, ...] = ()
    private: bool = False
    max_bytes: int = 512 << 20
    seconds: float = 300.0
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        try:
            self.tls()
        except OSError as error:
            raise ValueError(f"{self.ca_file} holds no certificates in PEM that can be read: {error}") from error
        for pattern in self.hosts:
            host = _split_host(pattern)[0]
            if not host or "*" in host.removeprefix("*.") or "/" in pattern:
                raise ValueError(
                    f"{pattern!r} is no host to fetch from: write example.org, *.example.org or example.org:8080"
                )

    def tls(self) -> ssl.SSLContext:
        """How servers must show who they are; raises an OSError where `ca_file` cannot be read."""
        context = ssl.create_default_context()
        if self.ca_file is not None:
            context.load_verify_locations(self.ca_file)
        return context

    def allows(self, url: httpx2.URL) -> bool:
        """Whether an address is at one of the hosts."""
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
        return any(_matches(pattern, host, port, usual=_PORTS[url.scheme]) for pattern in self.hosts)


def _split_host(pattern: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{pattern}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _matches(pattern: str, host: str, port: int, *, usual: int) -> bool:
    name, asked = _split_host(pattern)
    if port != (usual if asked is None else asked):
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


async def fetch(url: str, path: Path, *, fetch_policy: FetchPolicy) -> int:
    """Fetch a file.

    Args:
        url: http or https.
        path: where to put it.
        fetching: what may be fetched.

    Returns:
        Its size in bytes.

    Raises:
        SourceError: it may not be fetched, or cannot be.
        TooLargeError: it is larger than is taken.
    """
    try:
        async with asyncio.timeout(fetch_policy.seconds):
            return await _follow(url, path, fetch_policy)
    except TimeoutError as error:
        raise SourceError(f"the file at {_host(url)} did not come within {fetch_policy.seconds:g} s") from error
    except httpx2.TimeoutException as error:
        raise SourceError(f"{_host(url)} said nothing for {_SILENCE_SECONDS:g} s") from error
    except httpx2.HTTPError as error:
        raise SourceError(f"the file at {_host(url)} could not be fetched ({type(error).__name__}: {error})") from error


async def _follow(url: str, path: Path, fetch_policy: FetchPolicy) -> int:
    target = _parse(url, fetch_policy)
    for _ in range(_MOST_REDIRECTS + 1):
        addresses = await _look_up(target, fetch_policy)
        got = await _get(target, addresses, path, fetch_policy)
        if isinstance(got, int):
            return got
        after = _parse(got, fetch_policy, base=target)
        if target.scheme == "https" and after.scheme == "http":
            raise SourceError(f"{target.host} sends on from https to http, which is not followed")
        target = after
    raise SourceError(f"{_host(url)} sends on more than {_MOST_REDIRECTS} times, which is not followed")


def _parse(url: str, fetch_policy: FetchPolicy, *, base: httpx2.URL | None = None) -> httpx2.URL:
    """An address that files may be fetched from; `base` is what sent on to it."""
    if not fetch_policy.hosts:
        raise SourceError(
            "this server fetches nothing from other hosts: send the file itself as a data: URL, or start the server "
            "with --allow_hosts"
        )
    try:
        parsed = base.join(url[:_LONGEST_URL]) if base else httpx2.URL(url[:_LONGEST_URL])
    except httpx2.InvalidURL as error:
        raise SourceError(f"the URL cannot be read: {error}") from error
    if len(url) > _LONGEST_URL or parsed.scheme not in _PORTS or not parsed.host:
        raise SourceError(f"a file is fetched from an http or https URL of up to {_LONGEST_URL} letters")
    if parsed.userinfo:
        raise SourceError("a URL with a user name or password is not fetched: leave them out")
    if not fetch_policy.allows(parsed):
        raise SourceError(
            f"this server does not fetch from {parsed.netloc.decode('ascii')}: send the file itself as a data: URL, or "
            "start the server with that host among --allow_hosts"
        )
    return parsed


async def _look_up(url: httpx2.URL, fetch_policy: FetchPolicy) -> list[str]:
    """The addresses that a host has, all of which may be connected to."""
    host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(f"the host {url.host} is not known") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not _is_open(ipaddress.ip_address(address), private=fetch_policy.private):
            raise SourceError(
                f"the host {url.host} is at an address that is not public, from which nothing is fetched"
                + ("" if fetch_policy.private else ": start the server with --allow_private if it is yours")
            )
    return addresses


def _is_open(address: Address, *, private: bool) -> bool:
    """Whether an address may be connected to: a public one, or one of this network where these are allowed."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_open(inner, private=private)
        if address.teredo is not None or address.is_site_local or any(address in network for network in _NAT64):
            return False
    # Link-local: where cloud machines are told their secrets.
    if address.is_multicast or address.is_unspecified or address.is_link_local or address in _NEVER:
        return False
    return address.is_global or (private and (address.is_private or address.is_loopback))


async def _get(url: httpx2.URL, addresses: list[str], path: Path, fetch_policy: FetchPolicy) -> int | str:
    """The size of the file that was written, or the address that the host sends on to."""
    timeout, tls = httpx2.Timeout(_SILENCE_SECONDS), fetch_policy.tls()
    for number, address in enumerate(addresses):
        # A client each time: none keeps cookies, a proxy of the environment or a connection to another address.
        async with httpx2.AsyncClient(verify=tls, trust_env=False, follow_redirects=False, timeout=timeout) as client:
            request = client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={"Host": url.netloc.decode("ascii"), "Accept": "*/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": url.raw_host.decode("ascii"), "timeout": timeout.as_dict()},
            )
            try:
                response = await client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if number + 1 == len(addresses):
                    raise
                continue
            try:
                if response.has_redirect_location:
                    return response.headers["Location"]
                return await _write(response, url, path, fetch_policy)
            finally:
                await response.aclose()
    raise SourceError(f"the host {url.host} has no address")


async def _write(response: httpx2.Response, url: httpx2.URL, path: Path, fetch_policy: FetchPolicy) -> int:
    if response.status_code != httpx2.codes.OK:
        raise SourceError(f"{url.host} answers {response.status_code} instead of a file")
    # What is packed may be a thousand times as large as it comes.
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{url.host} sends the file packed, which is not taken")
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal():
        _require_small(int(declared), fetch_policy)
    size = 0
    with path.open("wb") as file:
        async for chunk in response.aiter_raw():
            size += len(chunk)
            _require_small(size, fetch_policy)
            file.write(chunk)
    return size


def _require_small(size: int, fetch_policy: FetchPolicy) -> None:
    if size > fetch_policy.max_bytes:
        raise TooLargeError(
            f"the file is larger than the {fetch_policy.max_bytes / (1 << 20):g} MiB that are taken here"
        )


def _host(url: str) -> str:
    """Whom to name in a message: the rest of an address may be a secret."""
    return urlsplit(url[:_LONGEST_URL]).hostname or "that host"
