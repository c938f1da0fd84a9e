"""Hostile files in `salmonn caption`: each gives a caption or a failure with a reason, and no other file is affected.

The long run (`make fuzz`) has 1,000 of them.
"""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.generator import Sampling
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from tests.launch import forked

MEDIA = Path(__file__).parents[2] / "shared" / "media"
SEED = 8
MAX_NEW_TOKENS = 6
# One in several files is intact.
GOOD_EVERY = 20


def truncate(data, random):
    return data[: random.integers(len(data))]


def flip_bits(data, random):
    broken = np.frombuffer(data, np.uint8).copy()
    offsets = random.integers(len(broken), size=int(2 ** random.integers(0, 10)))
    broken[offsets] ^= (1 << random.integers(8, size=len(offsets))).astype(np.uint8)
    return broken.tobytes()


def flip_head(data, random):
    """Flip bits in the header, which has sizes and counts."""
    head = min(len(data), 2000)
    return flip_bits(data[:head], random) + data[head:]


def overwrite(data, random):
    """Overwrite a part with all ones or zeros."""
    start, length = random.integers(len(data)), int(2 ** random.integers(2, 13))
    return data[:start] + bytes([random.choice([0, 255])]) * length + data[start + length :]


def swap(data, random):
    first, second = sorted(random.integers(len(data), size=2))
    length = min(4096, second - first)
    parts = data[first : first + length], data[second : second + length]
    return data[:first] + parts[1] + data[first + length : second] + parts[0] + data[second + length :]


def repeat(data, random):
    start = random.integers(len(data))
    return data[:start] + data


MUTATIONS = (truncate, flip_bits, flip_head, overwrite, swap, repeat)


@pytest.fixture(scope="module")
def sources(videos):
    """Good files of several kinds; the largest has 0.7 MB."""
    given = [path for path in sorted(MEDIA.glob("*")) if path.name != "corrupted.mp4" and path.suffix != ".flac"]
    return [*videos[:2], *given]


def write_broken(folder, sources, *, count):
    random = np.random.default_rng(SEED)
    for number in range(count):
        source = sources[number % len(sources)]
        mutate = MUTATIONS[(number + number // len(sources)) % len(MUTATIONS)]
        broken = mutate(source.read_bytes(), random)
        (folder / f"{number:04d}_{mutate.__name__}{source.suffix}").write_bytes(broken)


def write_pointers(folder, secret):
    """Files that hold nothing but the name of another one, under names that ask to be opened."""
    pointers = {
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "plain_playlist.ts": f"#EXTM3U\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
        "concat.mkv": f"ffconcat version 1.0\nfile '{secret}'\n",
        "concat_beside.mkv": "ffconcat version 1.0\nfile 0000_good.mp4\n",
        "concat_protocol.mp4": f"ffconcat version 1.0\nfile 'concat:{secret}|{secret}'\n",
        "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "manifest.mp4": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles='
            '"urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
            f'<Representation id="1" bandwidth="1"><BaseURL>file://{secret}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>"
        ),
        "web.mp4": "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/secret.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, text in pointers.items():
        (folder / name).write_text(text)
    return set(pointers)


def watch(process, pid_path, workers):
    """Collect the child processes of the captioning process, whose id is in a file, while it runs."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            workers.update(psutil.Process(int(pid_path.read_text())).children(recursive=True))
        time.sleep(0.1)


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_files_do_no_harm(count, sources, videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_broken(folder, sources, count=count)
    pointers = write_pointers(folder, videos[3])
    good = {folder / f"{number:04d}_good.mp4": videos[2] for number in range(0, count, GOOD_EVERY)}
    for path, video in good.items():
        path.write_bytes(video.read_bytes())
    out = tmp_path / "captions.jsonl"
    started = time.monotonic()
    # fmt: off
    pid_path = tmp_path / "pid"
    code = f"import os; open({str(pid_path)!r}, 'w').write(str(os.getpid())); from salmonn.cli import main; main()"
    process = subprocess.Popen(
        forked(
            sys.executable, "-c", code, "caption", folder, f"--out={out}",
            f"--max-new-tokens={MAX_NEW_TOKENS}", "--read-seconds=20", "--read-gib=1", "--max-failures=0",
        ),
        stderr=subprocess.PIPE, text=True,
    )
    # fmt: on
    workers = set()
    watcher = threading.Thread(target=watch, args=[process, pid_path, workers], daemon=True)
    watcher.start()
    _, err = process.communicate(timeout=60 + 20 * count)
    watcher.join()
    seconds = time.monotonic() - started
    captions = read_records(out, Caption)
    failures = read_records(tmp_path / "captions.failed.jsonl", Failure)
    reasons = Counter(re.sub(r"[\d.]+", "N", failure.reason.split(": ", 1)[-1])[:70] for failure in failures)
    sys.stdout.write(
        f"{count} files, seed {SEED}, {seconds:.0f} s: {len(captions)} captions, {len(failures)} failures\n"
    )
    sys.stdout.write("".join(f"{times:4d}  {reason}\n" for reason, times in reasons.most_common()))

    assert process.returncode == 1 and "Traceback" not in err
    files = sorted(map(str, folder.iterdir()))
    assert sorted([*(caption.video for caption in captions), *(failure.video for failure in failures)]) == files
    assert all(failure.video in failure.reason and len(failure.reason) > 20 for failure in failures)
    # A pointer is never followed.
    assert pointers <= {Path(failure.video).name for failure in failures}
    (expected,) = {caption.text for caption in captions if Path(caption.video).name.endswith("_good.mp4")}
    model = Captioner.load(SHIPPED_MODEL)
    assert expected == model.caption(videos[2], sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS)).text
    assert len([caption for caption in captions if Path(caption.video) in good]) == len(good)
    # Some broken files can be read in part, and most of the truncated ones cannot.
    assert failures and len(captions) > len(good)
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
