"""Fetching from untrusted URLs: allow-list, address checks, redirects and limits, with a real web server."""

import asyncio
import socket
import ssl
import subprocess
import time
from dataclasses import replace

import httpx2
import pytest

from salmonn.serve.fetch import FetchPolicy, SourceError, TooLargeError, fetch
from tests.serve.running import web_server

BODY = b"a video, say " * 1000


def reply(handler, body=b"", *, status=200, **headers):
    """Respond with the given headers; None omits a header."""
    handler.send_response(status)
    all_headers = {"Content-Length": str(len(body))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    for name, value in all_headers.items():
        if value is not None:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def reply_endlessly(handler):
    reply(handler, Content_Length=None)
    while True:
        handler.wfile.write(b"x" * 65536)


def reply_slowly(handler):
    reply(handler, Content_Length="1000")
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def handle_request(handler):
    path = handler.path.split("?")[0]
    if path.startswith("/hop/"):
        hops = int(path[5:])
        reply(handler, status=302, Location=f"/hop/{hops - 1}" if hops > 1 else "/video")
    elif path == "/to":
        reply(handler, status=307, Location=handler.path.split("?", 1)[1])
    elif path == "/cookie":
        reply(handler, status=302, Location="/seen_cookie", Set_Cookie="who=me; Path=/")
    elif path == "/seen_cookie":
        reply(handler, str(handler.headers.get("Cookie")).encode())
    else:
        answers = {
            "/video": lambda: reply(handler, BODY),
            "/endless": lambda: reply_endlessly(handler),
            "/slow": lambda: reply_slowly(handler),
            "/large": lambda: reply(handler, Content_Length=str(1 << 40)),
            "/packed": lambda: reply(handler, b"x", Content_Encoding="gzip"),
            "/short": lambda: reply(handler, b"x", Content_Length="1000"),
            "/encoding": lambda: reply(handler, handler.headers["Accept-Encoding"].encode()),
        }
        answers.get(path, lambda: reply(handler, status=404))()


@pytest.fixture
def web():
    with web_server(handle_request) as served:
        yield served


@pytest.fixture
def get(web, tmp_path):
    """Fetch a path from the web server and return the body."""

    def get_path(path, **changes):
        policy = replace(FetchPolicy((web[0],), private=True, max_bytes=1 << 20, seconds=60), **changes)
        url = path if path.startswith("http") else f"http://{web[0]}{path}"
        size = asyncio.run(fetch(url, tmp_path / "received", policy=policy))
        received = (tmp_path / "received").read_bytes()
        assert len(received) == size
        return received

    return get_path


@pytest.fixture
def names(monkeypatch):
    """Host names and their addresses, and a list of the look-ups so far."""
    addresses: dict[str, list[str]] = {}
    lookups: list[str] = []
    getaddrinfo = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host not in addresses:
            return getaddrinfo(host, port, *args, **kwargs)
        lookups.append(host)
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return addresses, lookups


def test_a_file_is_fetched(get, web, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nothing listens
    assert get("/video?token=1#part") == BODY
    assert web[1] == [(web[0], "/video?token=1")]
    assert get("/encoding") == b"identity"


def test_redirects_are_limited(get, web):
    assert get("/hop/5") == BODY
    with pytest.raises(SourceError, match="redirects more than 5 times"):
        get("/hop/6")
    assert get("/cookie") == b"None"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://elsewhere.example/video", "fetching from elsewhere.example is not allowed"),
        ("http://127.0.0.1/video", "fetching from 127.0.0.1 is"),  # another port
        ("https://{}/video", "could not be fetched"),  # no TLS there
        ("http://me:secret@{}/video", "user name or password"),
        ("http:///video", "must be http or https"),
        ("http://{}/" + "x" * 9000, "at most 8192 characters"),
        ("http://[::1/video", "invalid URL"),
        ("http://{}/none", "responded with status 404"),
        ("http://{}/packed", "compressed"),
        ("http://{}/short", "could not be fetched"),
    ],
)
def test_rejected_or_failed_fetches(get, web, url, message):
    with pytest.raises(SourceError, match=message) as caught:
        get(url.format(web[0]))
    assert "secret" not in str(caught.value)


def test_nothing_is_fetched_without_an_allow_list(get):
    with pytest.raises(SourceError, match="start the server with --allow-hosts"):
        get("/video", hosts=())


@pytest.mark.parametrize(
    "location", ["http://elsewhere.example/", "//elsewhere.example/", "file:///etc/hostname", "http://["]
)
def test_redirects_are_checked(get, web, location):
    with pytest.raises(SourceError, match=r"fetching from .* is not allowed|must be http or https|invalid URL"):
        get(f"/to?{location}")
    assert len(web[1]) == 1


def test_a_redirect_to_a_private_address_is_rejected(get, web, names):
    """The first host is allowed and public; it redirects to an allowed host that is this machine."""
    names[0]["inside.example"] = ["127.0.0.1"]
    port = web[0].split(":")[1]
    hosts = (web[0], f"inside.example:{port}")
    assert get(f"/to?http://inside.example:{port}/video", hosts=hosts) == BODY
    names[0]["inside.example"] = ["169.254.169.254"]
    with pytest.raises(SourceError, match=r"the host inside\.example has an address that is not public"):
        get(f"/to?http://inside.example:{port}/video", hosts=hosts)


def test_limits_apply_during_the_download(get):
    started = time.monotonic()
    with pytest.raises(TooLargeError, match="larger than the maximum of 1 MiB"):
        get("/endless")
    with pytest.raises(TooLargeError, match="larger than the maximum of 1 MiB"):
        get("/large")
    with pytest.raises(SourceError, match=r"took more than 0.5 s"):
        get("/slow", seconds=0.5)
    assert time.monotonic() - started < 60


def test_loopback_needs_permission(get, web, names):
    with pytest.raises(SourceError, match=r"not public, which is not allowed; .* --allow-private"):
        get("/video", private=False)
    names[0]["files.example"] = ["127.0.0.1"]
    port = web[0].split(":")[1]
    with pytest.raises(SourceError, match="not public"):
        get(f"http://files.example:{port}/video", hosts=(f"files.example:{port}",), private=False)
    assert not web[1]


def test_a_name_is_resolved_once(get, web, names):
    """A second look-up might return another address; the server still receives the name."""
    names[0]["files.example"] = ["127.0.0.1"]
    port = web[0].split(":")[1]
    assert get(f"http://files.example:{port}/video", hosts=(f"files.example:{port}",)) == BODY
    assert names[1] == ["files.example"] and web[1] == [(f"files.example:{port}", "/video")]


def test_all_addresses_are_checked_and_tried(get, web, names):
    port = web[0].split(":")[1]
    hosts = (f"files.example:{port}",)
    names[0]["files.example"] = ["127.0.0.1", "0.0.0.0"]
    with pytest.raises(SourceError, match="not public"):
        get(f"http://files.example:{port}/video", hosts=hosts)
    names[0]["files.example"] = ["127.0.0.2", "::1", "127.0.0.1"]  # nothing listens at the first two
    assert get(f"http://files.example:{port}/video", hosts=hosts) == BODY


@pytest.fixture
def secure(tmp_path):
    """Run a TLS web server with a self-signed certificate for files.example; yield its port and the certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    arguments = ["-addext", "subjectAltName=DNS:files.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*line.split(), *arguments], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with web_server(handle_request, tls=tls) as (host, _):
        yield host.split(":")[1], certificate


def test_certificates_are_checked(get, secure, names):
    """For the requested name, although the connection is made to an address."""
    port, certificate = secure
    names[0]["files.example"] = names[0]["other.example"] = ["127.0.0.1"]
    hosts = (f"files.example:{port}", f"other.example:{port}")
    assert get(f"https://files.example:{port}/video", hosts=hosts, ca_file=certificate) == BODY
    with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"):
        get(f"https://other.example:{port}/video", hosts=hosts, ca_file=certificate)
    with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"):
        get(f"https://files.example:{port}/video", hosts=hosts)
    with pytest.raises(SourceError, match="from https to http"):
        get(f"https://files.example:{port}/to?http://files.example:{port}/", hosts=hosts, ca_file=certificate)
    with pytest.raises(ValueError, match="cannot be read as PEM certificates"):
        FetchPolicy(ca_file=certificate.with_name("key.pem"))


# Special-purpose addresses of the IANA registries, and IPv6 addresses that embed such an IPv4 address.
SPECIAL = [
    "0.0.0.0",
    "169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "fe80::1",
    "fe80::1%1",
    "ff02::1",
    "fd00:ec2::254",
    "fec0::1",
    "::ffff:169.254.169.254",
    "2002:a9fe:a9fe::1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]
PRIVATE = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "::1", "fd12::1", "::ffff:10.0.0.1", "2002:7f00:1::"]


@pytest.mark.parametrize(
    ("address", "private"), [*((address, True) for address in SPECIAL), *((address, False) for address in PRIVATE)]
)
def test_blocked_addresses(get, names, address, private):
    names[0]["files.example"] = ["93.184.215.14", address]
    with pytest.raises(SourceError, match="not public"):
        get("http://files.example/video", hosts=("files.example",), private=private)


@pytest.mark.parametrize(
    ("pattern", "url", "allowed"),
    [
        ("example.org", "https://EXAMPLE.org/v", True),
        ("example.org", "https://example.org:443/v", True),
        ("example.org", "https://example.org:80/v", False),
        ("example.org", "https://www.example.org/v", False),
        ("example.org", "https://example.org.evil.example/v", False),
        ("Example.org:8080", "http://example.org:8080/v", True),
        ("example.org:8080", "http://example.org/v", False),
        ("*.example.org", "http://a.b.example.org/v", True),
        ("*.example.org", "http://example.org/v", False),
        ("*.example.org", "http://evilexample.org/v", False),
        ("[::1]:8000", "http://[::1]:8000/v", True),
    ],
)
def test_allow_list_patterns(pattern, url, allowed):
    assert FetchPolicy((pattern,)).allows(httpx2.URL(url)) is allowed
