"""The bar: what it shows of a run, with and without knowing how many videos there are."""

import time

from salmonn.batch.job import RunStats
from salmonn.batch.progress import JobProgress


def run(capsys, count) -> str:
    """Three videos in 0.3 s, of which the second fails."""
    stats = RunStats()
    with JobProgress(stats, count=count) as bar:
        for number in range(3):
            time.sleep(0.1)
            stats.videos += 1
            stats.failed += number == 1
            bar.step()
    return capsys.readouterr().err


def test_total_rate_and_failures(capsys):
    """Three in 0.3 s are 600 a minute at most; what was counted meanwhile is the total."""
    err = run(capsys, lambda: iter("abcde"))
    last = err.rstrip().splitlines()[-1]
    assert "3/5" in last and " 60%" in last and "1 failed" in last
    rate = float(last.partition(" clips/min")[0].rpartition(" ")[2])
    assert 200 < rate <= 600


def test_without_a_total(capsys):
    last = run(capsys, None).rstrip().splitlines()[-1]
    assert "3 videos" in last and "%" not in last and "1 failed" in last


def test_counting_ends_with_the_run(capsys):
    """Of a disk without end."""
    told = []

    def endless():
        while True:
            told.append(1)
            yield time.sleep(0.001)

    run(capsys, endless)
    time.sleep(0.1)
    count = len(told)
    time.sleep(0.2)
    assert len(told) == count > 100


def test_other_processes_show_none(capsys):
    with JobProgress(RunStats(videos=1), count=None, is_shown=False) as bar:
        bar.step()
    assert capsys.readouterr().err == ""
