"""Files of requests: data URLs, paths inside and outside the allowed folders, and the upload folder."""

import asyncio
import base64
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from salmonn.serve.fetch import FetchPolicy, SourceError, TooLargeError
from salmonn.serve.sources import MediaSources, find_local, resolve_media, upload_folder, write_data
from tests.limits import STEP_SECONDS

HELLO = base64.b64encode(b"hello").decode()  # aGVsbG8=


def test_data_becomes_a_file(tmp_path):
    size = write_data(f"data:video/mp4;base64,{HELLO}", tmp_path / "file", max_bytes=5)
    assert (tmp_path / "file").read_bytes() == b"hello" and size == 5
    large = bytes(range(256)) * 40_000  # more than one block of characters
    url = "DATA:;Base64," + base64.b64encode(large).decode()
    assert write_data(url, tmp_path / "file", max_bytes=1 << 30) == 10_240_000
    assert (tmp_path / "file").read_bytes() == large


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:video/mp4,hello", "with the file in base64"),
        ("data:video/mp4;base64", "with the file in base64"),
        ("data:" + "x" * 300 + ";base64,aGVsbG8=", "with the file in base64"),
        ("data:;base64,aGVs!G8=", "is not valid base64"),
    ],
)
def test_invalid_data_urls(tmp_path, url, message):
    with pytest.raises(SourceError, match=message):
        write_data(url, tmp_path / "file", max_bytes=100)


def test_data_that_is_too_large(tmp_path):
    """Nothing of it is left."""
    url = "data:;base64," + base64.b64encode(bytes((1 << 20) + 4)).decode()
    with pytest.raises(TooLargeError, match="larger than the maximum of 1 MiB"):
        write_data(url, tmp_path / "file", max_bytes=1 << 20)
    assert not (tmp_path / "file").exists()


@pytest.fixture
def tree(tmp_path):
    """Two allowed folders, and files outside them."""
    for name in ("root/in.mp4", "root/sub/a b.mp4", "other/o.mp4", "secret.mp4", "root-2/no.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "root/out.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "root/up").symlink_to(tmp_path)
    (tmp_path / "root/to_sub.mp4").symlink_to("sub/a b.mp4")
    (tmp_path / "root/loop.mp4").symlink_to("loop.mp4")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{}/root/in.mp4", "root/in.mp4"),
        ("in.mp4", "root/in.mp4"),
        ("sub/../in.mp4", "root/in.mp4"),
        ("file://{}/root/sub/a%20b.mp4", "root/sub/a b.mp4"),
        ("FILE://localhost{}/root/in.mp4", "root/in.mp4"),
        ("to_sub.mp4", "root/sub/a b.mp4"),
        ("o.mp4", "other/o.mp4"),
        ("{}/other/o.mp4", "other/o.mp4"),
        ("file:other/o.mp4", "other/o.mp4"),
        ("root/sub/a b.mp4", "root/sub/a b.mp4"),
    ],
)
def test_paths_below_an_allowed_folder(tree, path, expected, monkeypatch):
    """Absolute, relative to an allowed folder, or relative to the working directory."""
    monkeypatch.chdir(tree)
    found = find_local(path.format(tree), (tree / "root", tree / "other"))
    assert found.read_text() == expected and found == (tree / expected).resolve()


@pytest.mark.parametrize(
    "path",
    [
        "{}/secret.mp4",
        "../secret.mp4",
        "file://{}/root/../secret.mp4",
        "file://{}/root/%2e%2e/secret.mp4",
        "sub/../../secret.mp4",
        "secret.mp4",
        "file:root/../secret.mp4",
        "out.mp4",
        "up/secret.mp4",
        "loop.mp4",
        "{}/root-2/no.mp4",
        "{}/root",
        "",
        "/etc/hostname",
        "not_there.mp4",
        "in.mp4\0",
        "x" * 5000,
        "/dev/zero",
    ],
)
def test_paths_outside_are_rejected_without_details(tree, path, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(SourceError, match=r"^no such file below the allowed folders of this server$"):
        find_local(path.format(tree), (tree / "root", tree / "other"))


def test_an_allowed_folder_may_be_a_link(tree):
    (tree / "link").symlink_to(tree / "root")
    assert find_local(f"{tree}/link/in.mp4", (tree / "link",)) == (tree / "root/in.mp4").resolve()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("in.mp4", "start the server with --allowed-dirs"),
        ("file://server/in.mp4", "--allowed-dirs"),
        ("ftp://example.org/in.mp4", "ftp: unsupported URL scheme"),
        ("concat:a|b", "concat: unsupported URL scheme"),
        ("https://example.org/in.mp4", "start the server with --allow-hosts"),
    ],
)
def test_rejected_urls(tmp_path, url, message):
    with pytest.raises(SourceError, match=message):
        asyncio.run(resolve_media(url, tmp_path, sources=MediaSources()))


def test_a_file_url_must_refer_to_this_machine(tree):
    with pytest.raises(SourceError, match="must refer to this server"):
        find_local("file://elsewhere/in.mp4", (tree,))


def test_invalid_settings_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"--allowed-dirs .*none is not a folder"):
        MediaSources((tmp_path / "none",))
    for pattern in ("", "*", "exa*mple.org", "https://example.org", "example.org/videos", "example.org:port"):
        with pytest.raises(ValueError, match="is not a host"):
            FetchPolicy(hosts=(pattern,))


SERVER = """
import sys, time
from pathlib import Path
from salmonn.serve.sources import upload_folder

with upload_folder(Path(sys.argv[1])) as folder:
    (folder / "sent").write_text("a video")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_upload_folders_of_killed_servers_are_removed(tmp_path):
    """One server was killed, one is running, and a link has the name of an upload folder."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SERVER, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        killed, alive = (Path(process.stdout.readline().strip()) for process in processes)
        (tmp_path / "mine").mkdir()
        (tmp_path / "salmonn-uploads-mine").symlink_to(tmp_path / "mine")
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait(STEP_SECONDS)
        assert (killed / "sent").is_file()
        with upload_folder(tmp_path) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert not killed.exists() and (alive / "sent").is_file() and (tmp_path / "mine").is_dir()
            (folder / "sent").write_text("another")
        assert not folder.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
