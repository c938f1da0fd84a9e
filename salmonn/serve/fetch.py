"""Fetch files over HTTP with protection against SSRF: from an allow-list of hosts, and from public addresses only.

A host name is resolved once. Each of its addresses is checked, and the connection is made to a checked address, so that
the name cannot resolve to another one in between (DNS rebinding). Redirects are followed here, with the same checks.
"""

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

_MAX_REDIRECTS = 5
_MAX_URL_CHARS = 8192
_IDLE_SECONDS = 20.0  # for a host that sends nothing
_PORTS = {"http": 80, "https": 443}
# Metadata services of cloud providers (AWS over IPv6, Azure), and the broadcast address.
_BLOCKED_ADDRESSES = tuple(map(ipaddress.ip_address, ("fd00:ec2::254", "168.63.129.16", "255.255.255.255")))
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SourceError(ValueError):
    """A file that is not allowed or not available; the message is for the client."""


class TooLargeError(SourceError):
    """A file that is larger than the maximum."""


@dataclass(frozen=True)
class FetchPolicy:
    """Rules for fetching files.

    Args:
        hosts: allow-list: "example.org", "*.example.org" for all its subdomains, "example.org:8080" for another port
            than the scheme's; an empty list allows no fetching.
        private: whether private addresses are allowed too, for file servers of your own.
        max_bytes: maximum size of a file.
        seconds: time limit of a file, with all redirects.
        ca_file: further trusted certificates (PEM), for servers of your own.
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
            raise ValueError(f"{self.ca_file} cannot be read as PEM certificates: {error}") from error
        for pattern in self.hosts:
            host = _split_host(pattern)[0]
            if not host or "*" in host.removeprefix("*.") or "/" in pattern:
                raise ValueError(f"{pattern!r} is not a host: use example.org, *.example.org or example.org:8080")

    def tls(self) -> ssl.SSLContext:
        """Return the TLS context; raises an OSError if `ca_file` cannot be read."""
        context = ssl.create_default_context()
        if self.ca_file is not None:
            context.load_verify_locations(self.ca_file)
        return context

    def allows(self, url: httpx2.URL) -> bool:
        """Return whether the host and port of a URL match the allow-list."""
        host, default_port = url.raw_host.decode("ascii"), _PORTS[url.scheme]
        for pattern in self.hosts:
            name, port = _split_host(pattern)
            is_same_host = host.endswith(name[1:]) if name.startswith("*.") else host == name
            if is_same_host and (url.port or default_port) == (default_port if port is None else port):
                return True
        return False


def _split_host(pattern: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{pattern}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


async def fetch(url: str, path: Path, *, policy: FetchPolicy) -> int:
    """Download a file and return its size in bytes.

    Args:
        url: http or https URL.
        path: destination.
        policy: rules.

    Raises:
        SourceError: the policy forbids it, or the download failed.
        TooLargeError: the file is larger than the maximum.
    """
    host = _split_host(url[:_MAX_URL_CHARS].partition("://")[2])[0] or "the host"  # the rest of a URL may be secret
    try:
        async with asyncio.timeout(policy.seconds):
            return await _follow_redirects(url, path, policy)
    except TimeoutError as error:
        raise SourceError(f"downloading the file from {host} took more than {policy.seconds:g} s") from error
    except httpx2.TimeoutException as error:
        raise SourceError(f"{host} sent nothing for {_IDLE_SECONDS:g} s") from error
    except httpx2.HTTPError as error:
        raise SourceError(f"the file could not be fetched from {host} ({type(error).__name__}: {error})") from error


async def _follow_redirects(url: str, path: Path, policy: FetchPolicy) -> int:
    target = _parse(url, policy)
    for _ in range(_MAX_REDIRECTS + 1):
        addresses = await _resolve(target, policy)
        result = await _get(target, addresses, path, policy)
        if isinstance(result, int):
            return result
        redirect = _parse(result, policy, base=target)
        if target.scheme == "https" and redirect.scheme == "http":
            raise SourceError(f"{target.host} redirects from https to http, which is not followed")
        target = redirect
    raise SourceError(f"{target.host} redirects more than {_MAX_REDIRECTS} times")


def _parse(url: str, policy: FetchPolicy, *, base: httpx2.URL | None = None) -> httpx2.URL:
    """Return an allowed URL; it may be relative to the `base` that redirects to it."""
    if not policy.hosts:
        raise SourceError(
            "this server fetches no files from other hosts: send the file as a data: URL, or start the server with "
            "--allow-hosts"
        )
    try:
        parsed = base.join(url[:_MAX_URL_CHARS]) if base else httpx2.URL(url[:_MAX_URL_CHARS])
    except httpx2.InvalidURL as error:
        raise SourceError(f"invalid URL: {error}") from error
    if len(url) > _MAX_URL_CHARS or parsed.scheme not in _PORTS or not parsed.host:
        raise SourceError(f"a file URL must be http or https and have at most {_MAX_URL_CHARS} characters")
    if parsed.userinfo:
        raise SourceError("a file URL must not contain a user name or password")
    if not policy.allows(parsed):
        raise SourceError(
            f"fetching from {parsed.netloc.decode('ascii')} is not allowed: send the file as a data: URL, or start the "
            "server with that host in --allow-hosts"
        )
    return parsed


async def _resolve(url: httpx2.URL, policy: FetchPolicy) -> list[str]:
    """Return the addresses of a host, all of which must be allowed."""
    host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(f"the host {url.host} was not found") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not _is_allowed(ipaddress.ip_address(address), private=policy.private):
            raise SourceError(
                f"the host {url.host} has an address that is not public, which is not allowed"
                + ("" if policy.private else "; if it is yours, start the server with --allow-private")
            )
    return addresses


def _is_allowed(address: Address, *, private: bool) -> bool:
    """Return whether an address is public, or private if that is allowed."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is not None:
            return _is_allowed(embedded, private=private)
        if address.teredo is not None or address.is_site_local or any(address in network for network in _NAT64):
            return False
    # Link-local addresses include the metadata services of cloud providers.
    if address.is_multicast or address.is_unspecified or address.is_link_local or address in _BLOCKED_ADDRESSES:
        return False
    return address.is_global or (private and (address.is_private or address.is_loopback))


async def _get(url: httpx2.URL, addresses: list[str], path: Path, policy: FetchPolicy) -> int | str:
    """Return the size of the file that was written, or the address of a redirect."""
    timeout, tls = httpx2.Timeout(_IDLE_SECONDS), policy.tls()
    for number, address in enumerate(addresses):
        # A new client each time: no cookies, no proxies of the environment, no open connection to another address.
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
                return await _write(response, url, path, policy)
            finally:
                await response.aclose()
    raise SourceError(f"the host {url.host} has no address")


async def _write(response: httpx2.Response, url: httpx2.URL, path: Path, policy: FetchPolicy) -> int:
    if response.status_code != httpx2.codes.OK:
        raise SourceError(f"{url.host} responded with status {response.status_code}")
    # Compressed data may be a thousand times larger than its transfer.
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{url.host} sends the file compressed, which is not supported")
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal():
        _check_size(int(declared), policy)
    size = 0
    with path.open("wb") as file:
        async for chunk in response.aiter_raw():
            size += len(chunk)
            _check_size(size, policy)
            file.write(chunk)
    return size


def _check_size(size: int, policy: FetchPolicy) -> None:
    if size > policy.max_bytes:
        raise TooLargeError(f"the file is larger than the maximum of {policy.max_bytes / (1 << 20):g} MiB")
