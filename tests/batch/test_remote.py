"""Files where the data is: object stores, web servers and the Hub, all served by this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest

from salmonn.batch import remote
from salmonn.batch.discovery import Shard, VideoFile, VideoListing, address_of, stat_video
from salmonn.batch.fetch import FetchConfig, Fetcher
from salmonn.batch.remote import expand_braces, redact, without_secrets
from salmonn.files import read_records
from salmonn.media.container import ClipError
from salmonn.records import Caption, Failure
from tests.batch.remote_files import fetched, listed, tar_of
from tests.batch.stores import FileServer
from tests.launch import forked
from tests.limits import RUN_SECONDS


def test_braces_are_expanded_as_a_shell_does():
    assert list(expand_braces("s-{008..010}.tar")) == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert list(expand_braces("{a,b}/{1..2}")) == ["a/1", "a/2", "b/1", "b/2"]
    assert list(expand_braces("{3..1}{x}")) == ["3{x}", "2{x}", "1{x}"]
    for pattern in ("s-{008..010}.tar", "{a,b}/{1..2}", "{3..1}{x}"):
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
        assert list(expand_braces(pattern)) == shell.stdout.split()


def test_a_bucket_is_listed_like_a_folder(bucket):
    bucket.pipe({f"bucket/clips/{name}": b"x" for name in ("b.mp4", "a/one.mkv", "notes.txt", ".hidden.mp4")})
    listing = VideoListing(["s3://bucket/clips"])
    found = list(listing.videos())
    assert [one.path for one in found] == ["s3://bucket/clips/a/one.mkv", "s3://bucket/clips/b.mp4"]
    assert str(listing.skipped) == "1 .txt" and listing.is_read_once
    # The MD5 of "x" is the ETag.
    assert found[0] == VideoFile("s3://bucket/clips/a/one.mkv", 1, None, "9dd4e461268c8034f5c8564e155c67a6")
    assert stat_video(found[0].path) == found[0] == listed("s3://bucket/clips/*/*.mkv")[0]
    assert [one.path for one in listed("s3://bucket/clips", globs=["a/*"])] == [found[0].path]
    parts = [listed("s3://bucket/clips", shard=Shard(number, 2)) for number in (1, 2)]
    assert sorted(parts[0] + parts[1], key=lambda one: one.path) == found
    bucket.pipe("bucket/clips/b.mp4", b"y")
    assert listed("s3://bucket/clips/b.mp4")[0].etag != found[1].etag


def test_what_a_store_refuses_is_said_in_one_sentence(bucket, monkeypatch):
    bucket.pipe("bucket/a.mp4", b"x")
    (missing,) = listed("s3://bucket/no.mp4")
    assert missing.reason == "s3://bucket/no.mp4: there is no such file or folder; check the URL"
    with pytest.raises(ClipError, match=r"no file matches this pattern"):
        VideoListing(["s3://bucket/*.mkv"]).require_any()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nowhere")
    remote.filesystem.cache_clear()
    with pytest.raises(ClipError, match=r"access to s3://bucket was denied .*AWS_ACCESS_KEY_ID.*FSSPEC_S3_ANON=true"):
        VideoListing(["s3://bucket"]).require_any()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # as FSSPEC_S3_ANON=true sets it
    remote.filesystem.cache_clear()
    assert [one.path for one in listed("s3://bucket")] == ["s3://bucket/a.mp4"]


def test_unknown_schemes_and_missing_packages_are_named(monkeypatch):
    (unknown,) = listed("nfs5://disk/a.mp4")
    assert unknown.reason.startswith("nfs5:// is not a known URL scheme; use one of s3:// (package s3fs), gs://")
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    (missing,) = listed("gs://bucket/a.mp4")
    assert missing.reason == "gs:// needs gcsfs: pip install 'salmonn[gcs]' or pip install gcsfs"


def test_a_web_server_is_asked_again_and_its_failures_are_those_of_the_file(web, tmp_path):
    web.files = {"/a.mp4": b"first", "/b c.mp4": b"second", "/flaky.mp4": b"third", "/large.mp4": b"x" * 5000}
    web.failing = {"/gone.mp4": [404] * 9, "/secret.mp4": [403] * 9}
    names = ["a.mp4?part=1%2F2", "b c.mp4", "gone.mp4", "secret.mp4"]
    list_path = tmp_path / "list.txt"
    list_path.write_text("".join(f"{web.url}/{name}\n" for name in names))
    found = list(VideoListing(list_path=str(list_path)).videos())
    assert [one.path if isinstance(one, VideoFile) else one.video for one in found] == [
        f"{web.url}/{name}" for name in names
    ]
    assert found[0] == VideoFile(f"{web.url}/{names[0]}", 5, None, "8b04d5e3775d298e78455efc5ca404d5")
    assert "no such file" in found[2].reason and "denied" in found[3].reason
    assert fetched(*(f"{web.url}/{name}" for name in names[:2])) == {
        f"{web.url}/{names[0]}": b"first",
        f"{web.url}/{names[1]}": b"second",
    }
    web.failing["/flaky.mp4"] = [503, 503]  # of the HEAD and GET requests of the first attempt
    video = listed(f"{web.url}/flaky.mp4")
    web.failing["/flaky.mp4"] = [503, 503]
    with Fetcher() as fetcher:
        ((_, _, path),) = fetcher.ahead(enumerate(video))
        assert path.read_bytes() == b"third" and path.parent.exists()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("clips/a.mp4?token=1", None),
        ("s3://bucket/a.mp4?token=1", None),
        ("https://h/a.mp4?versionId=7&part=1%2F2#t=5", None),
        ("https://h/a.mp4?Expires=5&st=1", None),  # without a signature they are the server's own
        ("https://user:pw@h:81/a.mp4", "https://h:81/a.mp4"),
        ("sftp://user:pw@h/a.mp4", "sftp://user@h/a.mp4"),
        ("abfs://box@account.net/a.mp4", None),
        (
            "https://h/a.mp4?X-Amz-Algorithm=A&X-Amz-Credential=K%2F1&versionId=7&X-Amz-Date=1&X-Amz-Signature=S#t=5",
            "https://h/a.mp4?versionId=7#t=5",
        ),
        ("https://h/a?AWSAccessKeyId=K&Signature=S&Expires=5", "https://h/a"),
        ("https://h/a?X-Goog-Signature=S&X-Goog-Expires=5", "https://h/a"),
        ("https://h/a.mp4?Expires=5&Policy=P&Signature=S&Key-Pair-Id=K", "https://h/a.mp4"),
        ("https://h/a.mp4?sv=2024&st=1&se=2&sr=b&sp=r&sig=S&snapshot=9", "https://h/a.mp4?snapshot=9"),
        ("https://h/A.MP4?Token=T&expires=5&quality=hd", "https://h/A.MP4?quality=hd"),
        ("https://h/get?id=3&token=T", "https://h/get?id=3&token=hash-5e1f6993fb941fa7"),
    ],
)
def test_passwords_and_signatures_are_not_recorded(url, expected):
    assert without_secrets(url) == (expected or url) == without_secrets(without_secrets(url))
    assert redact(f"{url}: denied ('{url}')", url) == f"{expected or url}: denied ('{expected or url}')"


class SigningServer(FileServer):
    """A web server that sends files only to those who have the current signature."""

    signature = "first"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if parse_qs(urlsplit(path).query).get("X-Amz-Signature") != [self.signature]:
            return 403, b"", {}
        return super().answer(method, path, body)


@pytest.fixture
def signing():
    server = SigningServer()
    yield server
    server.close()


def test_a_newly_signed_list_captions_only_what_is_left(short_videos, caption, signing, tmp_path, monkeypatch):
    """Videos and an archive; one signature expires between listing and fetching, and is not in any file."""
    first, archived, third = (video.read_bytes() for video in short_videos[:3])
    signing.files = {"/0.mp4": first, "/2.mp4": third, "/s.tar": tar_of({"x.mp4": archived})}
    names = ("0.mp4", "2.mp4", "s.tar")

    def sign(signature: str, *named: str) -> list[str]:
        return [f"{signing.url}/{name}?X-Amz-Credential=K%2F1&X-Amz-Signature={signature}" for name in named]

    list_path = tmp_path / "list.txt"
    list_path.write_text("\n".join([*sign("first", "0.mp4", "s.tar"), *sign("secret", "2.mp4")]))
    expired = Fetcher._copy

    def expire(self, video, out):  # after it was listed
        if video.path.endswith("0.mp4"):
            signing.signature = "second"
        expired(self, video, out)

    monkeypatch.setattr("salmonn.batch.fetch.NUM_FETCHING", 1)
    monkeypatch.setattr(Fetcher, "_copy", expire)
    code, err = caption("--list", list_path)
    assert code == 1 and "0.mp4: access to http://127.0.0.1" in err
    failures = read_records(tmp_path / "captions.failed.jsonl", Failure)
    assert {one.video for one in failures} == {f"{signing.url}/{name}" for name in ("0.mp4", "2.mp4", "s.tar::x.mp4")}
    monkeypatch.setattr(Fetcher, "_copy", expired)
    list_path.write_text("\n".join(sign("second", *names)))
    code, err = caption("--list", list_path, "--retry-failed")
    assert code == 0, err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert {one.video for one in captions} == {one.video for one in failures} and len(captions) == 3
    signing.signature = "third"
    list_path.write_text("\n".join(sign("third", *names)))
    code, err = caption("--list", list_path, "--export", "csv")
    assert code == 0 and "3 videos already done, skipped" in err
    for path in tmp_path.rglob("captions*"):
        assert b"X-Amz" not in path.read_bytes() and b"secret" not in path.read_bytes()
    assert "X-Amz" not in err


def test_passwords_in_urls_are_used_and_not_recorded(web):
    web.files = {"/a.mp4": b"first", "/s.tar": tar_of({"x.mp4": b"second"})}
    place = web.url.removeprefix("http://")
    urls = [f"http://user:pass@{place}/{name}" for name in ("a.mp4", "s.tar", "gone.mp4")]
    found = fetched(*urls[:2])
    assert found == {f"{web.url}/a.mp4": b"first", f"{web.url}/s.tar::x.mp4": b"second"}
    assert web.authorizations and set(web.authorizations) == {"Basic dXNlcjpwYXNz"}
    video, _, gone = listed(*urls)
    assert gone.video == f"{web.url}/gone.mp4" and "pass" not in gone.reason + repr(video)
    addresses = VideoListing([f"http://user:pass@{place}/clips/"]).addresses()
    assert address_of(f"{web.url}/clips/s.tar::x.mp4", addresses) == f"http://user:pass@{place}/clips/s.tar::x.mp4"


def test_limits_of_a_file(web):
    web.files = {"/large.mp4": b"x" * 5000}
    url = f"{web.url}/large.mp4"
    assert fetched(url, gib=4000 / (1 << 30))[url].startswith(
        f"{url}: the file has more than 3.72529e-06 GiB; increase --scratch-gib"
    )
    assert "took more than 1e-09 s" in fetched(url, seconds=1e-9)[url]
    (video,) = listed(url)
    web.files["/large.mp4"] = b"changed"
    with Fetcher() as fetcher:
        ((_, _, path),) = fetcher.ahead([(0, video)])
        assert not path.exists()
        assert "7 bytes were received, and it had 5000 when it was listed" in fetcher.explain(video, "")


def test_files_are_fetched_ahead_up_to_a_size():
    """Files of 1000 bytes, and room for three of them: no fourth is fetched before one is released."""
    store = fsspec.filesystem("memory")
    store.pipe({f"/clips/{number}.mp4": b"x" * 1000 for number in range(8)})
    videos = listed("memory://clips")
    with Fetcher(FetchConfig(gib=2500 / (1 << 30))) as fetcher:
        ahead = fetcher.ahead(enumerate(videos))
        taken = []
        for index, video, path in ahead:
            taken.append(video)
            assert path.exists() and len(list(path.parent.iterdir())) <= max(3, len(taken))
            assert fetcher.bucket_share(path) == pytest.approx(1000 / (2500 / 4))
            if index >= 2:
                fetcher.release(taken.pop(0))
        assert index == 7
    store.rm("/clips", recursive=True)


def test_the_scratch_of_a_killed_run_is_deleted(tmp_path):
    with Fetcher(FetchConfig(folder=tmp_path)) as first, Fetcher(FetchConfig(folder=tmp_path)) as second:
        host = socket.gethostname()
        # Locks of another machine may not be visible on this one.
        for name in (f"{host}-left", f"{host}-2-theirs", "other-theirs"):
            (tmp_path / f"salmonn-scratch-{name}").mkdir()
            (tmp_path / f"salmonn-scratch-{name}" / "a.mp4").write_bytes(b"x")
        store = fsspec.filesystem("memory")
        store.pipe("/one.mp4", b"x")
        for fetcher in (first, second):
            assert [path.read_bytes() for _, _, path in fetcher.ahead(enumerate(listed("memory://one.mp4")))] == [b"x"]
        assert len(list(tmp_path.iterdir())) == 4
    assert {path.name for path in tmp_path.rglob("*")} == {
        "a.mp4",
        f"salmonn-scratch-{host}-2-theirs",
        "salmonn-scratch-other-theirs",
    }


def test_datasets_on_the_hub(hub):
    hub.files = {"clips/a.mp4": b"one", "clips/b.mp4": b"two", "README.md": b"x"}
    found = listed("hf://datasets/ORG/NAME")
    assert [(one.path, one.size_bytes) for one in found] == [
        ("hf://datasets/ORG/NAME/clips/a.mp4", 3),
        ("hf://datasets/ORG/NAME/clips/b.mp4", 3),
    ]
    assert all(len(one.etag) == 40 for one in found)
    assert fetched("hf://datasets/ORG/NAME/clips/*.mp4") == {found[0].path: b"one", found[1].path: b"two"}
    (private,) = listed("hf://datasets/ORG/OTHER/a.mp4")
    assert "if it is private, run `hf auth login` or set HF_TOKEN" in private.reason


KILLED_WHILE_WRITING = """
import os, signal, sys
from salmonn import cli
from salmonn.batch import ledger

append_records, calls = ledger.append_records, []

def append_or_die(path, records):
    calls.append(path)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    append_records(path, records)

ledger.append_records = append_or_die
cli.main(sys.argv[1:])
"""


def test_remote_files_are_captioned_once_through_kills_and_changes(
    short_videos, bucket, caption, random_model, tmp_path
):
    """Five videos of a bucket and two in an archive there: killed, resumed, and captioned again where changed."""
    for number, video in enumerate(short_videos):
        bucket.put_file(str(video), f"bucket/clips/{number}.mp4")
    shard = tar_of({f"{number}.mp4": short_videos[number].read_bytes() for number in (0, 1)})
    bucket.pipe("bucket/shard-00.tar", shard)
    bucket.pipe("bucket/clips/broken.mp4", b"broken")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    args = ["s3://bucket/clips", "s3://bucket/shard-{00..00}.tar", "--scratch-dir", scratch]
    out = tmp_path / "captions.jsonl"
    model = ["--model", random_model, "--max-new-tokens", 6, "--workers", 1, "--batch-size", 1]
    command = forked(sys.executable, "-c", KILLED_WHILE_WRITING, "caption", *args, "--out", out, *model)
    killed = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = out.read_bytes()
    assert before.count(b"\n") == 3 and list(scratch.iterdir())
    code, err = caption(*args)
    assert code == 1 and "3 videos already done, skipped" in err and not list(scratch.iterdir())
    assert out.read_bytes().startswith(before)
    captions = read_records(out, Caption)
    urls = {f"s3://bucket/clips/{number}.mp4" for number in range(5)} | {
        f"s3://bucket/shard-00.tar::{one}.mp4" for one in (0, 1)
    }
    assert len(captions) == 7 and {one.video for one in captions} == urls
    assert all(one.etag and one.size_bytes and one.modified_ns is None for one in captions)
    (failure,) = read_records(tmp_path / "captions.failed.jsonl", Failure)
    assert failure.video == "s3://bucket/clips/broken.mp4" and failure.reason.startswith(failure.video)
    assert str(scratch) not in failure.reason
    # Nothing is left to do; then one object changes, and the broken one is repaired.
    assert "nothing to do" in caption(*args)[1]
    bucket.put_file(str(short_videos[1]), "bucket/clips/0.mp4")
    bucket.put_file(str(short_videos[0]), "bucket/clips/broken.mp4")
    assert caption(*args, "--retry-failed")[0] == 0
    assert caption(*args)[0] == 0
    again = [one.video for one in read_records(out, Caption)[7:]]
    assert again == ["s3://bucket/clips/broken.mp4", "s3://bucket/clips/0.mp4"]


def test_the_captions_are_those_of_local_files(short_videos, caption, tmp_path):
    """The seed follows from the name alone, so with the likeliest words the texts are equal."""
    store = fsspec.filesystem("memory")
    for number, video in enumerate(short_videos):
        store.put_file(str(video), f"/clips/{number}.mp4")
        (tmp_path / f"{number}.mp4").write_bytes(video.read_bytes())
    room = 1.5 * max(video.stat().st_size for video in short_videos) / (1 << 30)  # for one or two at a time
    options = ("--segments", 1, "--scratch-gib", room)
    code, err = caption("memory://clips", *options)
    assert code == 0, err
    assert caption(tmp_path, *options, out="local.jsonl")[0] == 0
    remote_captions, local = (read_records(tmp_path / name, Caption) for name in ("captions.jsonl", "local.jsonl"))
    key = lambda one: (Path(one.video).name, one.start_seconds)  # noqa: E731
    assert [(key(one), one.text) for one in sorted(remote_captions, key=key)] == [
        (key(one), one.text) for one in sorted(local, key=key)
    ]
    store.rm("/clips", recursive=True)


def test_subtitles_of_remote_videos_need_a_folder(short_videos, caption, tmp_path, call):
    store = fsspec.filesystem("memory")
    store.put_file(str(short_videos[0]), "/clips/a.mp4")
    code, err = caption("memory://clips", "--export", "srt")
    assert code == 2 and "subtitles are written next to local videos only, and memory://clips is remote; choose" in err
    code, err = caption("memory://clips", "--export", "srt", "--subtitle-dir", tmp_path / "subtitles")
    assert code == 0, err
    assert (tmp_path / "subtitles" / "memory" / "clips" / "a.mp4.srt").read_text().startswith("1\n00:00:00,000 -->")
    store.rm("/clips", recursive=True)


def test_fields_are_those_of_the_remote_video(short_videos, caption, tmp_path):
    """Not of the scratch file; and there is no text beside the video that {sidecar} could be."""
    store = fsspec.filesystem("memory")
    store.put_file(str(short_videos[0]), "/pier/harbour.mp4")
    (tmp_path / "c.tar").write_bytes(tar_of({"x/tug.mp4": short_videos[0].read_bytes()}))
    paths = ("memory://pier/harbour.mp4", tmp_path / "c.tar")
    code, err = caption(*paths, "--prompt", "{name} in {folder}?", "--suffix", " ({name})")
    assert code == 0, err
    captions = read_records(tmp_path / "captions.jsonl", Caption)
    assert [one.prompt for one in captions] == ["harbour in pier?", "tug in x?"]
    assert [one.text.rpartition(" ")[2] for one in captions] == ["(harbour)", "(tug)"]
    (tmp_path / "list.txt").write_text("memory://pier/harbour.mp4\n")
    code, err = caption("--list", tmp_path / "list.txt", "--prompt", "{sidecar}", out="listed.jsonl")
    assert code == 1 and "memory://pier/harbour.mp4: {sidecar} is a text file next to a local video; download" in err
    store.rm("/pier", recursive=True)
