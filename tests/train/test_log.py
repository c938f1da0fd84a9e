"""The log of steps and rounds: what a file and TensorBoard hold after kills and resumes."""

import json
import time
from itertools import count
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from salmonn.score.metrics import Rates
from salmonn.train.log import StepLog, log_rounds
from salmonn.train.run_log import RunSummary, read_steps


def seen(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them now."""
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Event files are made a second apart, as they are in earnest: TensorBoard takes them in the order of names."""
    now = count(int(time.time()))
    clock = SimpleNamespace(time=lambda: next(now))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


@pytest.fixture
def stage(tmp_path):
    """A folder in which a run was killed while it wrote its fourth step, and what TensorBoard has read of it."""
    log = StepLog(tmp_path / "round_1")
    log.resume(0)
    for step in range(3):
        log(step, {"loss": step + 0.5, "grad_norm": 10.0 * step})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    accumulator = EventAccumulator(str(tmp_path / "round_1"))
    accumulator.Reload()
    yield tmp_path / "round_1", accumulator
    log.close()


def test_what_is_logged_is_on_disk_before_the_end(stage):
    folder, accumulator = stage
    lines = (folder / "steps.jsonl").read_text().splitlines()
    assert lines[:2] == [
        '{"step": 0, "loss": 0.5, "grad_norm": 0.0}',
        '{"step": 1, "loss": 1.5, "grad_norm": 10.0}',
    ]
    assert seen(accumulator, "loss") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert seen(accumulator, "grad_norm") == [(0, 0.0), (1, 10.0), (2, 20.0)]


@pytest.mark.parametrize(("first", "kept"), [(0, []), (2, [0.5, 1.5]), (3, [0.5, 1.5, 2.5])])
def test_a_resumed_log_has_every_step_once(stage, first, kept):
    """Steps from `first` on are done again, with 100 in place of what they gave before."""
    folder, before = stage
    log = StepLog(folder)
    log.resume(first)
    assert [figures["loss"] for figures in read_steps(log.path)] == kept
    for step in range(first, 5):
        log(step, {"loss": 100.0})
    log.close()
    expected = list(enumerate(kept + [100.0] * (5 - first)))
    assert [(figures["step"], figures["loss"]) for figures in read_steps(log.path)] == expected
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 5
    assert seen(EventAccumulator(str(folder)), "loss") == expected == seen(before, "loss")


def test_lines_that_are_not_whole_are_passed_over(tmp_path):
    """A full disk cuts a line off in the middle of the file, and the next one is glued to it."""
    path = tmp_path / "steps.jsonl"
    path.write_bytes(
        b'{"step": 0, "loss": 1.0}\n{"step": 1, "l{"step": 2, "loss": 3.0}\n\n7\n\xff\n{"step": 3, "kl": 0}\n'
    )
    assert read_steps(path) == [{"step": 0, "loss": 1.0}, {"step": 3, "kl": 0}]
    assert read_steps(tmp_path / "absent.jsonl") == []


def test_rounds_against_their_numbers(tmp_path):
    start, better = Rates(0.5, 0.25, 0.75, 0.125), Rates(0.25, 0.25, 0.5, 0.0, qa_accuracy=0.625)
    watching = EventAccumulator(str(tmp_path))
    log_rounds(tmp_path, RunSummary(start))
    assert seen(watching, "Total") == [(0, 0.75)]
    for summary in (RunSummary(start, [better]), RunSummary(start, [better], better, kl={"round 1": 0.375})):
        log_rounds(tmp_path, summary)
    for accumulator in (EventAccumulator(str(tmp_path)), watching):
        assert seen(accumulator, "Total") == [(0, 0.75), (1, 0.5), (2, 0.5)]
        assert seen(accumulator, "Hallucination") == [(0, 0.25), (1, 0.25), (2, 0.25)]
        assert seen(accumulator, "Repetition") == [(0, 0.125), (1, 0.0), (2, 0.0)]
        assert seen(accumulator, "QA accuracy") == [(1, 0.625), (2, 0.625)]
        assert seen(accumulator, "KL") == [(1, 0.375)]
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["total"], line["kl"]) for line in lines] == [
        ("SFT", 0.75, None), ("round 1", 0.5, 0.375), ("rebirth", 0.5, None)
    ]  # fmt: skip
