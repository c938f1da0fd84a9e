"""`salmonn caption --server`: a real process that is killed and resumed, interrupted, and out of budget."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from jsonargparse import Namespace

from salmonn.batch.discovery import stat_video
from salmonn.batch.job import CaptionJob, JobConfig, caption_videos
from salmonn.batch.ledger import Ledger
from salmonn.batch.segment_logs import SegmentLog
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipReader
from salmonn.caption.segments import FixedSegments
from salmonn.caption.server import ServerCaptioner
from salmonn.caption.server_options import ServerOptions
from salmonn.cli.caption_server import report_spending
from salmonn.files import read_json, read_records
from salmonn.records import Caption
from salmonn.score.budget import Budget
from tests.caption.served_model import captioner, describe
from tests.launch import forked, kill
from tests.limits import STEP_SECONDS, wait_until
from tests.score.fake_llm_server import Answer

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.usefixtures("written_probe_clips")

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(server, folder, out, *flags):
    model = ["--server", server.url, "--server-model", "m", "--server-input", "frames"]
    return ["caption", folder, "--out", out, "--workers", 0, *model, *flags]


def count_lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT"])
def test_an_ended_run_is_resumed(folder, serve, call, tmp_path, end):
    """Each video is captioned once; after Ctrl-C, replies in flight are saved, too."""
    out = tmp_path / "captions.jsonl"
    is_held, is_released = [False], [False]

    def script(request, number):
        if number >= 7 and not is_released[0]:  # four of the probe, three videos
            is_held[0] = True
            wait_until(lambda: is_released[0])
        return Answer(describe(request))

    server = serve(script)
    process = subprocess.Popen(
        forked(BIN / "salmonn", *command(server, folder, out, "--concurrency", 2, "--workers", 1)),
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    # With two requests in flight, the program waits for replies, and does not write a caption.
    wait_until(
        lambda: process.poll() is not None or (is_held[0] and count_lines(out) >= 3 and len(server.requests) >= 9)
    )
    assert process.poll() is None, process.stderr.read()
    before = out.read_bytes()
    if end == "SIGKILL":
        kill(process)
        is_released[0] = True
    else:
        process.send_signal(signal.SIGINT)
        while "waiting for replies in flight" not in process.stderr.readline():
            assert process.poll() is None
        is_released[0] = True
        assert process.wait(STEP_SECONDS) == 130
        assert count_lines(out) >= 4
        assert re.search(r"^requests to servers: \d+ requests, \d+ tokens by m at", process.stderr.read(), re.MULTILINE)
    done = read_records(out, Caption)
    num_requests = len(server.requests)
    code, _, err = call(*command(server, folder, out))
    assert code == 0 and f"{len(done)} videos already done, skipped" in err
    assert out.read_bytes().startswith(before)
    captions = read_records(out, Caption)
    assert len(captions) == len({one.video for one in captions}) == 6
    assert len(server.requests) == num_requests + 4 + 6 - len(done)
    process.stderr.close()


@pytest.fixture
def interruptible():
    """Ctrl-C raises a KeyboardInterrupt, also if the tests run in the background of a script."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("num_videos", "num_interrupts"), [(5, 1), (5, 2), (1, 1)])
def test_ctrl_c_while_a_caption_is_written(serve, videos, files, monkeypatch, num_videos, num_interrupts):
    """Two requests are in flight, and the second is answered only once the program says that it waits for it.

    A second Ctrl-C comes at that moment, and ends the run without the second reply. With one video, none is in flight.
    """
    num_sent = min(2, num_videos)
    is_announced = threading.Event()

    def script(request, number):
        wait_until(lambda: len(server.requests) >= num_sent)
        if number:
            is_announced.wait(STEP_SECONDS)
        return Answer(describe(request))

    class Announcement(logging.Handler):
        def emit(self, record):
            assert record.getMessage().startswith("waiting for replies in flight, which will be saved")
            if num_interrupts == 2:
                signal.raise_signal(signal.SIGINT)
            is_announced.set()

    server, write = serve(script), Ledger.write

    def interrupted_write(ledger, captions):
        if not files.captions.exists():
            signal.raise_signal(signal.SIGINT)
        write(ledger, captions)

    monkeypatch.setattr(Ledger, "write", interrupted_write)
    announcement, logger = Announcement(), logging.getLogger("salmonn.caption.server")
    logger.addHandler(announcement)
    config = JobConfig(CaptionRequest(Path(), "Say."))
    with Ledger(files, job={}) as ledger, ClipReader(workers=0) as reader:
        job = CaptionJob(ledger)
        client = ServerCaptioner(ServerOptions(server.url, "m"))
        found = map(stat_video, map(str, videos[:num_videos]))
        try:
            with pytest.raises(KeyboardInterrupt):
                for result in caption_videos(client, job.pending(found), config=config, reader=reader):
                    job.save(result)
            assert is_announced.is_set() == (num_videos > 1 and num_interrupts == 1)
        finally:
            logger.removeHandler(announcement)
            is_announced.set()
    assert len(server.requests) == num_sent
    assert len(read_records(files.captions, Caption)) == job.stats.captions == (1 if num_interrupts == 2 else num_sent)


def test_a_reply_is_saved_before_the_next_file_is_found(serve, videos, files):
    """The listing waits until a caption is on the disk, and would wait forever if replies waited for the next file."""
    server = serve(captioner())
    ahead = 2  # files that the reader takes beside the one that it yields

    def listing():
        yield from map(stat_video, map(str, videos[: 1 + ahead]))
        wait_until(lambda: count_lines(files.captions))
        yield from map(stat_video, map(str, videos[1 + ahead :]))

    config = JobConfig(CaptionRequest(Path(), "Say."))
    with Ledger(files, job={}) as ledger, ClipReader(workers=0) as reader:
        job = CaptionJob(ledger)
        client = ServerCaptioner(ServerOptions(server.url, "m"))
        for result in caption_videos(client, job.pending(listing()), config=config, reader=reader):
            job.save(result)
    assert (job.stats.captions, job.stats.failed) == (len(videos), 0)
    assert {one.video for one in read_records(files.captions, Caption)} == set(map(str, videos))


@pytest.mark.parametrize("is_changed", [False, True])
def test_finished_segments_of_a_killed_run_are_not_paid_again(serve, videos, files, is_changed):
    """Closing the generator before a film is finished leaves what kill -9 leaves; other segments are a failure."""
    config = JobConfig(CaptionRequest(Path(), "Say."), segments=FixedSegments(1.0))
    server = serve(captioner())

    def run(config, *, num_requests=None):
        """Caption the first video, until a third segment is about to be answered where `num_requests` says so."""
        sent = len(server.requests)
        with Ledger(files, job={}) as ledger, ClipReader(workers=0) as reader:
            job, log = CaptionJob(ledger), SegmentLog(ledger)
            client = ServerCaptioner(ServerOptions(server.url, "m", concurrency=1))
            found = [stat_video(str(videos[0]))]
            if num_requests is not None:
                client = _Killed(client, num_requests)
            with suppress(RuntimeError):
                for result in caption_videos(client, job.pending(found), config=config, reader=reader, log=log):
                    job.save(result)
        return len(server.requests) - sent, job.stats

    sent, _ = run(config, num_requests=2)
    assert sent >= 2 and not files.captions.exists() and count_lines(files.segments) == 2
    with files.segments.open("a") as file:
        file.write('{"video": "torn')
    if is_changed:
        _, stats = run(replace(config, segments=FixedSegments(1.5)))
        assert (stats.captions, stats.failed) == (0, 1)
        assert "not those that an earlier run captioned" in files.failed.read_text()
    else:
        sent, stats = run(config)
        captions = read_records(files.captions, Caption)
        assert [one.segment for one in captions] == list(range(captions[0].num_segments))
        assert sent == len(captions) - 2 > 0 and stats.captions == len(captions)
    assert not files.segments.exists()


class _Killed:
    """A captioner that ends the run after some results."""

    def __init__(self, captioner, num_results):
        self._captioner, self._num_results = captioner, num_results
        self.default_sampling = captioner.default_sampling

    def caption_batches(self, *args, **options):
        with closing(self._captioner.caption_batches(*args, **options)) as batches:
            yield from islice(batches, self._num_results)
        raise RuntimeError("killed")


def test_a_resumed_run_sends_what_was_chosen_first(folder, serve, call, tmp_path):
    """The first server refuses files; the second one takes them, but would be asked for other captions."""
    out = tmp_path / "captions.jsonl"
    for refused, limit in ((("video_url",), 1), ((), 2)):
        server = serve(captioner(refused=refused, hears_video=True))
        model = ("--server", server.url, "--server-model", "m", "--workers", 0, "--quiet")
        code, _, err = call("caption", folder, "--out", out, *model, "--limit", limit)
        assert code == 0, err
        assert read_json(tmp_path / "captions.job.json")["server_input"] == "frames"
    captions = read_records(out, Caption)
    assert len(captions) == 3 and all("frames, 0 files" in one.text for one in captions)
    assert len(server.requests) == 4 + 2  # and no other input is tried
    code, _, err = call("caption", folder, "--out", out, *model, "--server-input", "video")
    assert code == 2 and 'was made with --server-input "frames" (now "video")' in err


def test_a_run_out_of_budget_is_resumed(folder, serve, call, tmp_path):
    out = tmp_path / "captions.jsonl"
    server = serve(captioner())
    limited = command(server, folder, out, "--max-requests", 8, "--quiet")
    for number, (done, is_complete) in enumerate([(4, False), (6, True)]):
        code, _, err = call(*limited)
        assert (code, count_lines(out)) == (0 if is_complete else 2, done), (number, err)
        if not is_complete:
            # The last answer may still be in flight.
            cap = r"error: the cap of 8 requests is reached \(8 requests, [78]0 tokens in this run\). Finished captions"
            assert re.match(cap, err)
            assert err.count("\n") == 1
    assert len({one.video for one in read_records(out, Caption)}) == 6
    assert len(server.requests) == 8 + 6


def test_all_servers_share_the_budget_and_have_keys_of_their_own(folder, serve, call, tmp_path, monkeypatch):
    """4 requests of the probe, one for each of two segments and for its refinement, and one that fuses them.

    The second run takes the finished segment of the first one, which is not paid for again.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    monkeypatch.setenv("CAPTION_KEY", "caption")
    monkeypatch.setenv("FUSE_KEY", "fuse")
    out = tmp_path / "captions.jsonl"
    served, refiner, fuser = serve(captioner()), serve(echo), serve(echo)
    flags = [
        "--segments", 1, "--server-api-key-env", "CAPTION_KEY", "--refine", "Rewrite {caption}", "--refine-server",
        refiner.url, "--refine-model", "r", "--fuse", "text-model", "--fuse-server", fuser.url, "--fuse-model", "f",
        "--fuse-api-key-env", "FUSE_KEY", "--max-requests",
    ]  # fmt: skip
    code, _, err = call(*command(served, folder / "0.mp4", out, *flags, 7))
    total = r"6 requests, \d+ tokens by m at \S+; 1 request, \d+ tokens by r at"
    assert code == 2 and re.search(rf"the cap of 7 requests is reached \({total}", err), err
    assert not fuser.requests
    code, _, err = call(*command(served, folder / "0.mp4", out, *flags, 9))
    assert code == 0 and re.search(r"requests to servers: 5 requests.* by m at .*; 1 request, .* by r at", err), err
    assert "; 1 request, 10 tokens by f at" in err
    assert [{one["Authorization"] for one in server.headers} for server in (served, refiner, fuser)] == [
        {"Bearer caption"}, {"Bearer none"}, {"Bearer fuse"},
    ]  # fmt: skip
    assert "caption" not in (tmp_path / "captions.job.json").read_text().replace("{caption}", "")


def test_requests_of_a_cluster_are_said_not_to_be_counted(capsys):
    for engine in ("local", "ray"):
        report_spending(Namespace(engine=engine, refine_model="r", budget=Budget()))
    assert capsys.readouterr().err == "requests of the cluster's actors to r are not counted\n"


def echo(request, number):
    """Answer with a text that depends on the request alone."""
    return Answer(f"Text {zlib.crc32(request['messages'][0]['content'].encode())}.")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-requests", "9"], "--max-requests has no effect without --server, or the server of a text model"),
        (["--refine-api-key-env", "KEY"], "--refine-api-key-env is for the server of a text model"),
        (["--fuse-api-key-env", "KEY"], "--fuse-api-key-env needs --fuse"),
        (
            ["--refine", "{caption}", "--refine-model", "m", "--refine-api-key-env", "NO_SUCH_KEY"],
            "the environment variable NO_SUCH_KEY is not set; set it to the API key, or leave out --refine-api-key-env",
        ),
        (
            [
                "--refine",
                "{caption}",
                "--refine-server",
                "http://localhost:1/v1",
                "--refine-model",
                "m",
                "--engine",
                "ray",
                "--max-requests",
                "9",
            ],
            "--max-requests cannot be kept by the actors of a cluster",
        ),
        (["--server-model", "m"], "--server-model has no effect without --server"),
        (["--allow-deaf"], "--allow-deaf has no effect without --server"),
        (
            ["--server", "http://localhost:1/v1", "--model", "x"],
            "--model is for local models; remove it, or remove --server",
        ),
        (["--server", "http://localhost:1/v1", "--batch-size", "2"], "--batch-size is for local models"),
        (["--server", "http://localhost:1/v1"], "--server needs the name of a model on it: pass --server-model"),
        (["--server", "localhost:1", "--server-model", "m"], "must be an address such as http://localhost:8000/v1"),
        (["--server", "http://127.0.0.1:9/v1", "--server-model", "m"], "http://127.0.0.1:9/v1 cannot be reached: "),
    ],
)
def test_mistakes_are_one_sentence(folder, call, tmp_path, flags, message):
    code, out, err = call("caption", folder, "--out", tmp_path / "captions.jsonl", *flags)
    assert code == 2 and not out and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "captions.jsonl").exists()
