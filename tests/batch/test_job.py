"""The caption job: which videos it skips, what it saves, when it stops, and its progress bar."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.batch.discovery import Shard, VideoFile, path_number, stat_video
from salmonn.batch.job import (
    CaptionJob,
    JobConfig,
    RunStats,
    TooManyFailures,
    VideoResult,
    caption_videos,
    show_progress,
)
from salmonn.batch.ledger import Ledger
from salmonn.batch.subtitles import SubtitleWriter
from salmonn.caption.generator import CaptionRequest, Sampling, SegmentResult
from salmonn.caption.loader import ClipReader
from salmonn.caption.segments import FixedSegments
from salmonn.files import read_records
from salmonn.records import Caption, Failure


def opened(files) -> Ledger:
    return Ledger(files, job={"model": "toy"})


def video(number: int) -> VideoFile:
    return VideoFile(f"/data/{number}.mp4", 5, 7)


def video_result(number: int, *results: str, index: int | None = None) -> VideoResult:
    """A result for each segment: "ok", or the reason of a failure."""
    made = tuple(
        Caption(video(number).path, "ok", start_seconds=float(start), size_bytes=5, modified_ns=7)
        if words == "ok"
        else Failure(video(number).path, words, "read", start_seconds=float(start), size_bytes=5, modified_ns=7)
        for start, words in enumerate(results)
    )
    return VideoResult(number if index is None else index, video(number), made)


def run_all(job: CaptionJob, results: dict[int, tuple[str, ...]], *, order=None) -> None:
    """List videos 0, 1, ... and save their results in some order."""
    pending = job.pending([video(number) for number in range(len(results))])
    indices = {int(Path(one.path).stem): index for index, one in pending}
    for number in order or sorted(indices):
        job.save(video_result(number, *results[number], index=indices[number]))


def test_each_video_is_captioned_once(files):
    """Also if it is named twice, or was captioned or failed in an earlier run."""
    with opened(files) as ledger:
        run_all(CaptionJob(ledger), {0: ("ok",), 1: ("broken",)})
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        listed = [video(0), video(1), video(2), video(0), video(2), video(3), Failure("/data/sub", "unreadable")]
        assert list(job.pending(listed)) == [(0, video(2)), (1, video(3))]
        stats = job.stats
        assert (stats.done_before, stats.failed_before, stats.failed, stats.videos) == (1, 1, 1, 1)
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        changed = [
            replace(video(0), size_bytes=6),
            replace(video(1), modified_ns=8),
            Failure("/data/sub", "unreadable"),
        ]
        assert [one for _, one in job.pending(changed)] == changed[:2]
        assert job.stats.failed_before == 1  # the folder


def test_a_video_with_a_failed_segment_counts_as_failed(files):
    """Its other segments are captioned."""
    reasons = []
    with opened(files) as ledger:
        job = CaptionJob(ledger, on_failure=reasons.append)
        run_all(job, {0: ("ok", "broken", "ok")})
        assert (job.stats.captions, job.stats.videos, job.stats.failed) == (2, 1, 1)
    assert [one.start_seconds for one in read_records(files.captions, Caption)] == [0.0, 2.0]
    assert [one.start_seconds for one in read_records(files.failed, Failure)] == [1.0]
    assert reasons == ["broken"]


def test_captions_of_incomplete_files_are_counted(files):
    """Three of five: a whole video, and two segments of another one."""
    complete = {0: (False,), 1: (True, False, False), 2: (True,)}
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        for index, one in job.pending(map(video, complete)):
            results = video_result(index, *["ok"] * len(complete[index])).results
            marked = [replace(result, complete=value) for result, value in zip(results, complete[index], strict=True)]
            job.save(VideoResult(index, one, tuple(marked)))
        assert (job.stats.captions, job.stats.incomplete, job.stats.failed) == (5, 3, 0)
    assert [one.complete for one in read_records(files.captions, Caption)] == [False, True, False, False, True]


def test_partial_failures_are_reported_by_the_next_run(files, tmp_path):
    """A failed segment or subtitle file: the video is skipped, and counted as failed before."""
    with opened(files) as ledger:
        run_all(CaptionJob(ledger), {0: ("ok", "broken"), 1: ("ok", "ok"), 2: ("broken", "ok")})
        ledger.fail([Failure(video(1).path, "mine", "write", size_bytes=5, modified_ns=7)])
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        assert list(job.pending(map(video, range(3)))) == []
        assert (job.stats.done_before, job.stats.failed_before) == (0, 3)
        # Another version of the file has not failed.
        assert ledger.status(replace(video(0), size_bytes=6)) == "pending"
    with opened(files) as ledger:  # a retry captions the rest
        job = CaptionJob(ledger, is_retry=True)
        run_all(job, {0: ("ok", "ok"), 1: ("ok", "ok"), 2: ("ok", "ok")})
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        assert list(job.pending(map(video, range(3)))) == []
        assert (job.stats.done_before, job.stats.failed_before) == (2, 1)  # the subtitle file's failure is still there


SEGMENTS = [("ok", "broken", "ok"), ("broken", "ok", "ok"), ("ok", "ok", "broken")]


@pytest.mark.parametrize("results", SEGMENTS)
@pytest.mark.parametrize("dies_in", ["write", "fail"])
def test_a_kill_between_captions_and_failures_loses_nothing(files, monkeypatch, results, dies_in):
    """Whichever of the two was not written, the video is captioned again without --retry-failed."""
    with opened(files) as ledger:
        monkeypatch.setattr(Ledger, dies_in, lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_all(CaptionJob(ledger), {0: results})
        monkeypatch.undo()
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        assert list(ledger.to_retry()) == []  # nothing is left to a retry alone
        run_all(job, {0: results})
        assert (job.stats.captions, job.stats.failed) == (2, 1)
    assert len({one.start_seconds for one in read_records(files.captions, Caption)}) == 2
    with opened(files) as ledger:  # then it is skipped
        job = CaptionJob(ledger)
        assert list(job.pending([video(0)])) == [] and job.stats.failed_before == 1
        run_all(CaptionJob(ledger, is_retry=True), {0: ("ok",) * 3})
        ledger.replace_failures([])
    with opened(files) as ledger:  # complete, without a list of failures
        job = CaptionJob(ledger)
        assert list(job.pending([video(0)])) == [] and job.stats.done_before == 1


def test_a_result_that_is_saved_twice_counts_once(files):
    """A cluster may caption a block twice."""
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        indices = [index for index, _ in job.pending([video(0), video(1)])]
        for number in (0, 1, 0, 1):
            job.save(video_result(number, "ok", index=indices[number]))
    assert len(read_records(files.captions, Caption)) == 2


BAD, OK = ("broken",), ("ok",)


def test_too_many_failures_in_a_row_stop_the_run(files):
    with opened(files) as ledger:
        job = CaptionJob(ledger, max_failures=3)
        with pytest.raises(TooManyFailures, match=r"3 videos failed in a row, the last with: broken\..*--retry-failed"):
            run_all(job, {0: OK, 1: BAD, 2: BAD, 3: OK, 4: BAD, 5: BAD, 6: BAD, 7: OK})
        assert job.stats.videos == 7
    assert len(read_records(files.failed, Failure)) == 5


def test_broken_files_among_good_ones_do_not_stop_the_run(files):
    """Every second of 40 is broken, and these finish first, since batches have clips of similar length."""
    results = {number: (OK if number % 2 else BAD) for number in range(40)}
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    with opened(files) as ledger:
        job = CaptionJob(ledger, max_failures=2)
        run_all(job, results, order=order)
    assert job.stats.failed == 20 == len(read_records(files.captions, Caption))


def test_a_video_counts_as_one_failure_in_a_row_and_only_without_captions(files):
    with opened(files) as ledger:
        run_all(
            CaptionJob(ledger, max_failures=3), {0: ("broken",) * 9, 1: ("broken", "ok"), 2: ("broken",) * 9, 3: BAD}
        )


def test_zero_and_a_retry_have_no_limit_of_failures(files):
    many = {number: BAD for number in range(30)}
    with opened(files) as ledger:
        run_all(CaptionJob(ledger, max_failures=0), many)
    with opened(files) as ledger:
        job = CaptionJob(ledger, max_failures=1, is_retry=True)
        run_all(job, many)
        assert len(job.failed_again) == 30
    with pytest.raises(ValueError, match="--max-failures"), opened(files) as ledger:
        CaptionJob(ledger, max_failures=-1)


def test_folders_that_cannot_be_listed_count_as_failures_in_a_row(files):
    with opened(files) as ledger, pytest.raises(TooManyFailures):
        list(CaptionJob(ledger, max_failures=2).pending([Failure("/a", "gone"), Failure("/b", "gone"), video(0)]))


def test_a_retry_replaces_the_list_of_failures(files, tmp_path):
    """One file succeeds, the other fails again, for another reason; a kill before the end leaves the old list."""
    paths = [tmp_path / f"{name}.mp4" for name in ("good", "bad")]
    for path in paths:
        path.write_bytes(b"12345")
    now = [stat_video(str(path)) for path in paths]
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        for index, one in job.pending(now):
            job.save(VideoResult(index, one, (Failure(one.path, "broken", size_bytes=5, modified_ns=one.modified_ns),)))
    for is_killed in (True, False):
        with opened(files) as ledger:
            job = CaptionJob(ledger, is_retry=True)
            listed = list(ledger.to_retry())
            assert listed == (now if is_killed else now[1:])
            for index, one in job.pending(listed):
                known = dict(size_bytes=5, modified_ns=one.modified_ns)
                good = one.path == str(paths[0])
                job.save(
                    VideoResult(
                        index, one, (Caption(one.path, "ok", **known) if good else Failure(one.path, "still", **known),)
                    )
                )
            if not is_killed:
                job.finish()
    assert [one.video for one in read_records(files.captions, Caption)] == [str(paths[0])]
    assert [(one.video, one.reason) for one in read_records(files.failed, Failure)] == [(str(paths[1]), "still")]


@pytest.fixture
def films(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"12345")
    return [stat_video(str(tmp_path / f"{name}.mp4")) for name in ("a", "b")]


def run_with_subtitles(ledger, films, **options) -> CaptionJob:
    """Caption the pending videos, then write missing subtitle files."""
    log = ledger.files.subtitles
    job = CaptionJob(ledger, subtitles=SubtitleWriter(["txt"], log=log, logs=[log] if log.exists() else []), **options)
    for index, one in job.pending(ledger.to_retry() if options else films):
        job.save(VideoResult(index, one, (Caption(one.path, "ok", size_bytes=5, modified_ns=one.modified_ns),)))
    job.finish()
    return job


def test_missing_subtitles_of_earlier_runs_are_written(files, films, tmp_path):
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        for index, one in job.pending(films[:1]):
            job.save(VideoResult(index, one, (Caption(one.path, "before", size_bytes=5, modified_ns=one.modified_ns),)))
    with opened(files) as ledger:
        run_with_subtitles(ledger, films)
    assert (tmp_path / "a.txt").read_text() == "before\n" and (tmp_path / "b.txt").read_text() == "ok\n"


@pytest.mark.parametrize("shard", [Shard(1, 2), Shard(2, 2), Shard(2, 3)])
def test_each_shard_writes_missing_subtitles_of_its_videos(files, films, tmp_path, shard):
    """Whichever process captioned the videos."""
    with opened(files) as ledger:
        job = CaptionJob(ledger)
        for index, one in job.pending(films):
            job.save(VideoResult(index, one, (Caption(one.path, "before", size_bytes=5, modified_ns=one.modified_ns),)))
    with opened(replace(files, shard=shard)) as ledger:
        run_with_subtitles(ledger, [one for one in films if shard.holds(one.path)])
    for film in films:
        assert Path(film.path).with_suffix(".txt").exists() == shard.holds(film.path)


def test_a_failed_subtitle_file_is_retried_only_by_a_retry(files, films, tmp_path):
    """Its captions are kept, and on success it is removed from the list of failures."""
    (tmp_path / "a.txt").write_text("mine")
    with opened(files) as ledger:
        job = run_with_subtitles(ledger, films)
        assert (job.stats.captions, job.stats.failed) == (2, 1)
    with opened(files) as ledger:
        assert run_with_subtitles(ledger, films).stats.failed == 0
    with opened(files) as ledger:
        assert run_with_subtitles(ledger, films, is_retry=True).stats.failed == 1
    with opened(files) as ledger:  # a retry without subtitle files leaves the list as it is
        job = CaptionJob(ledger, is_retry=True)
        assert list(job.pending(ledger.to_retry())) == []
        job.finish()
    (failure,) = read_records(files.failed, Failure)
    assert failure.stage == "write" and (tmp_path / "a.txt").read_text() == "mine"
    (tmp_path / "a.txt").unlink()
    with opened(files) as ledger:
        assert run_with_subtitles(ledger, films, is_retry=True).stats.failed == 0
    assert (tmp_path / "a.txt").read_text() == "ok\n" and not files.failed.exists()
    assert len(read_records(files.captions, Caption)) == 2


class Scripted:
    """A fake captioner that interleaves the segments of two videos."""

    def __init__(self) -> None:
        self.requests: list[CaptionRequest] = []
        self.options: dict = {}

    def default_sampling(self) -> Sampling:
        return Sampling(max_new_tokens=17)

    def caption_batches(self, requests, **options):
        self.requests, self.options = list(requests), options

        def done(place: int, start: float) -> SegmentResult:
            return SegmentResult(place, 2, Caption(str(self.requests[place].path), "ok", start_seconds=start))

        yield [done(1, 2.0), done(0, 0.0)]
        yield [done(0, 2.0)]
        yield [done(1, 0.0)]


def test_a_video_is_yielded_when_its_last_segment_is_done():
    captioner = Scripted()
    with ClipReader(workers=0) as reader:
        config = JobConfig(
            CaptionRequest(Path(), "Say.", Sampling(temperature=1.0), seed=3), segments=FixedSegments(2.0), batch_size=4
        )
        groups = list(caption_videos(captioner, [(7, video(0)), (9, video(1))], config=config, reader=reader))
    assert [(one.index, one.video) for one in groups] == [(7, video(0)), (9, video(1))]
    assert [[result.start_seconds for result in one.results] for one in groups] == [[0.0, 2.0], [0.0, 2.0]]
    assert all((result.size_bytes, result.modified_ns) == (5, 7) for one in groups for result in one.results)
    # A video's seed depends on its path; the default token limit is the model's own.
    assert [one.seed for one in captioner.requests] == [3 + path_number(video(number).path) for number in (0, 1)]
    for request in captioner.requests:
        assert request.sampling == Sampling(temperature=1.0, max_new_tokens=17) and request.prompt == "Say."
    assert captioner.options["segments"] == FixedSegments(2.0) and captioner.options["batch_size"] == 4


def show_three_videos(capsys, count) -> str:
    """Show the progress of three videos in 0.3 s, of which the second one fails."""
    stats = RunStats()
    with show_progress(stats, count=count) as update:
        for number in range(3):
            time.sleep(0.1)
            stats.videos += 1
            stats.failed += number == 1
            update()
    return capsys.readouterr().err


def test_progress_with_total_rate_and_failures(capsys):
    """Three in 0.3 s are 600 per minute at most."""
    err = show_three_videos(capsys, lambda: iter("abcde"))
    last = err.rstrip().splitlines()[-1]
    assert "3/5" in last and " 60%" in last and "1 failed" in last
    rate = float(last.partition(" clips/min")[0].rpartition(" ")[2])
    assert 200 < rate <= 600


def test_progress_without_a_total(capsys):
    last = show_three_videos(capsys, None).rstrip().splitlines()[-1]
    assert "3 videos" in last and "%" not in last and "1 failed" in last


def test_counting_videos_ends_with_the_run(capsys):
    """The listing is endless."""
    listed = []

    def endless():
        while True:
            listed.append(1)
            yield time.sleep(0.001)

    show_three_videos(capsys, endless)
    time.sleep(0.1)
    count = len(listed)
    time.sleep(0.2)
    assert len(listed) == count > 100


def test_only_one_process_shows_progress(capsys):
    with show_progress(RunStats(videos=1), count=None, is_shown=False) as update:
        update()
    assert capsys.readouterr().err == ""
