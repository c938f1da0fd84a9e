"""Logs and summaries of a run: summary.json, the table, run folders, curves, the page, and step logs after kills."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from salmonn.files import write_json, write_records, write_text
from salmonn.records import Comparison
from salmonn.score.metrics import Rates
from salmonn.train.plots import plot_curves, plot_summary, points_of, smooth, thin, write_page
from salmonn.train.run_log import (
    ROUNDING_NAME,
    RewardRound,
    RunRecord,
    RunSummary,
    StepLog,
    log_summary,
    print_summary,
    read_run,
    read_steps,
)
from tests.score.browser import MonitoredPage, needs_browser, start_browser

SFT = Rates(missing=0.5, hallucination=0.25, total=0.75, repetition=0.125, qa_accuracy=0.4, clips=20)
ROUNDS = [Rates(0.375, 0.25, 0.625, 0.0625, 0.5, 20), Rates(0.25, 0.125, 0.375, 0.03125, 0.6, 20)]
REBIRTH = Rates(0.3, 0.1, 0.4, 0.0, 0.7, 20)
STOPPED = "Total went from 37.5 to <b>62.5</b> %"
SUMMARY = RunSummary(SFT, ROUNDS, REBIRTH, {"round 1": 0.0125, "rebirth": 0.25}, "round_2", STOPPED)


def as_json(*values):
    """Return an entry of summary.json, with defaults for the other keys."""
    names = ("missing", "hallucination", "total", "repetition", "qa_accuracy", "clips")
    rest = {"incorrect": 0, "hallucinated": 0, "words": 0, "cut_off": 0, "captions": 0}
    return dict(zip(names, values, strict=True)) | rest | {"audio_share": None, "order": None}


def write_steps(folder: Path, steps: Iterable[dict]) -> None:
    write_text(folder / "steps.jsonl", "".join(json.dumps({"step": n, **step}) + "\n" for n, step in enumerate(steps)))


@pytest.fixture
def run_folder(tmp_path):
    """Two rounds of 4 steps and a rebirth of 6, with pairs of the first round."""
    folder = tmp_path / "a <run>"
    for name in ("round_1", "round_2"):
        rewards = [{"loss": 0.7 - n / 10, "chosen": 0.1 * n, "rejected": -0.1 * n, "grad_norm": 1.0} for n in range(4)]
        write_steps(folder / name, rewards)
    write_steps(folder / "rebirth", ({"loss": 1.0, "learning_rate": 2e-4} for _ in range(6)))
    pair = Comparison("v", "p", chosen="a red star", rejected="a star", ground_truth="", margin=0.5)
    write_records(
        folder / "round_1" / "pairs.jsonl", [pair, replace(pair, chosen="one two three four five", margin=0.25)]
    )
    write_json(folder / "summary.json", asdict(SUMMARY))
    write_text(folder / "mrdpo.yaml", "model: <script>alert(1)</script>\n")
    return folder


def test_summary_json(tmp_path):
    write_json(tmp_path / "summary.json", asdict(SUMMARY))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {
        "sft": as_json(0.5, 0.25, 0.75, 0.125, 0.4, 20),
        "rounds": [as_json(0.375, 0.25, 0.625, 0.0625, 0.5, 20), as_json(0.25, 0.125, 0.375, 0.03125, 0.6, 20)],
        "rebirth": as_json(0.3, 0.1, 0.4, 0.0, 0.7, 20),
        "kl": {"round 1": 0.0125, "rebirth": 0.25},
        "best": "round_2",
        "stopped": STOPPED,
        "reward": [],
        "proxy": {},
    }
    assert RunSummary.from_json(written) == SUMMARY
    old = {name: written[name] for name in ("sft", "rounds", "rebirth")}  # the format of older runs
    assert RunSummary.from_json(old) == RunSummary(SFT, ROUNDS, REBIRTH)


def test_stages_are_in_temporal_order():
    assert list(SUMMARY.stages) == ["SFT", "round 1", "round 2", "rebirth"]
    assert list(RunSummary(SFT).stages) == ["SFT"]
    assert (
        SUMMARY.stages["round 2"] == ROUNDS[1]
        and SUMMARY.best_stage == "round 2"
        and RunSummary(SFT).best_stage is None
    )


def test_table_in_percent(capsys):
    print_summary(
        RunSummary(SFT, ROUNDS[:1], Rates(0.3, 0.1, 0.4, 0.0, None, 20), {"rebirth": 0.0625}, "round_1", STOPPED)
    )
    rows, out = {}, capsys.readouterr().out
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").strip(" │").split("│")]
        rows[cells[0]] = cells[1:]
    assert rows["SFT"] == ["50.0", "25.0", "75.0", "12.5", "40.0", "-"]
    assert rows["round 1, best"] == ["37.5", "25.0", "62.5", "6.2", "50.0", "-"]
    assert rows["rebirth"] == ["30.0", "10.0", "40.0", "0.0", "-", "0.062"]
    column_titles = ["Missing %", "Hallucination %", "Total %", "Repetition %", "QA accuracy %", "KL, nats per token"]
    assert rows["stage"] == column_titles
    assert f"stopped: {STOPPED}" in out


@pytest.mark.parametrize("rebirth", [REBIRTH, None, Rates(0.3, 0.1, 0.4, 0.0, None, 20)])
def test_plot_writes_a_png(tmp_path, rebirth):
    plot_summary(RunSummary(SFT, ROUNDS, rebirth), tmp_path / "summary.png")
    data = (tmp_path / "summary.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000  # not an empty image


def test_a_complete_run(run_folder):
    record = read_run(run_folder)
    assert record.summary == SUMMARY and record.is_complete and record.config.startswith("model:")
    assert [(stage.name, len(stage.steps)) for stage in record.stages] == [
        ("round 1", 4),
        ("round 2", 4),
        ("rebirth", 6),
    ]
    pairs = record.stages[0].pairs
    # Gaps 0.5 and 0.25; 3 and 5 words against 2 and 2.
    assert (pairs.num_pairs, pairs.mean_margin, pairs.mean_words_chosen, pairs.mean_words_rejected) == (2, 0.375, 4, 2)
    assert record.stages[1].pairs is None


def test_an_unfinished_run(run_folder):
    """Round 10 is the last one, and its number sorts after round 2."""
    (run_folder / "summary.json").unlink()
    assert read_run(run_folder).summary is None
    write_steps(run_folder / "round_10", [{"loss": 1.0}])
    measured = {"sft": SFT, "round_10": ROUNDS[1], "round_2": ROUNDS[0]}
    for name, rates in measured.items():
        write_json(run_folder / name / "heldout" / "rates.json", asdict(rates))
    write_json(run_folder / "round_2" / "heldout" / "kl_16.json", 0.5)
    record = read_run(run_folder)
    assert record.summary == RunSummary(SFT, ROUNDS, kl={"round 2": 0.5}) and not record.is_complete
    assert [stage.name for stage in record.stages] == ["round 1", "round 2", "round 10", "rebirth"]


def test_folders_that_are_no_stages_are_left_out(run_folder):
    """Votes are written to `votes` inside the run folder by default; their pairs are not those of a round."""
    stages = [stage.name for stage in read_run(run_folder).stages]
    pair = Comparison("v", "p", chosen="a red star", rejected="a star", ground_truth="", margin=None)
    write_records(run_folder / "votes" / "pairs.jsonl", [pair])
    write_text(run_folder / "notes" / "pairs.jsonl", "of another program\n")
    assert [stage.name for stage in read_run(run_folder).stages] == stages


def test_a_run_of_one_stage(tmp_path):
    """sft.py writes only its rates, dpo.py writes none."""
    write_steps(tmp_path, [{"loss": 1.0}])
    record = read_run(tmp_path)
    assert record.summary is None and [stage.name for stage in record.stages] == [tmp_path.name]
    write_json(tmp_path / "summary.json", asdict(SFT))
    assert read_run(tmp_path).summary == RunSummary(SFT)


@pytest.mark.parametrize("text", ['{"sft": {"missing": 1}}', '{"sft": null, "rounds": [], "rebirth": null}', "[]", "{"])
def test_invalid_summaries(tmp_path, text):
    write_text(tmp_path / "summary.json", text)
    with pytest.raises(ValueError, match=r"summary\.json is not the summary of a run"):
        read_run(tmp_path)


def test_folders_without_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"holds no run; pass the folder that a recipe wrote to"):
            read_run(folder)
    write_records(tmp_path / "round_1" / "pairs.jsonl", [Comparison("v", "p", "c", "r", "g")])
    with pytest.raises(ValueError, match="no steps and no rates yet"):
        plot_curves(read_run(tmp_path), tmp_path / "curves.png")


def test_points_of_a_figure():
    steps = [{"step": 0, "kl": 0.0}, {"step": 1}, {"step": 2, "kl": 3.0}]
    assert points_of(steps, "kl", start=10) == [(10, 0.0), (12, 3.0)]
    # Five points in groups of two: (0, 10) and (1, 20), (2, 30) and (3, 50), and (4, 70).
    assert thin([(0, 10), (1, 20), (2, 30), (3, 50), (4, 70)], size=2) == [(0.5, 15), (2.5, 40), (4, 70)]


def test_smoothing_is_a_mean_of_neighbours():
    # For four values, one neighbour on either side: (0 + 3) / 2, (0 + 3 + 6) / 3, (3 + 6 + 0) / 3, (6 + 0) / 2.
    assert smooth([0.0, 3.0, 6.0, 0.0]) == [1.5, 3.0, 3.0, 3.0]
    # For 40, two on either side, so a single 5 is averaged over five.
    assert smooth([0.0] * 20 + [5.0] + [0.0] * 19) == [0.0] * 18 + [1.0] * 5 + [0.0] * 17
    assert smooth([]) == []


def test_curves_of_consecutive_stages(run_folder, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_curves(read_run(run_folder), tmp_path / "curves.png")
    axes_by_title = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert list(axes_by_title) == ["Held-out rates, %", "Loss", "Rewards", "Gradient norm", "Learning rate"]
    loss = axes_by_title["Loss"]
    # Each stage has its steps, their mean, and a line where the next stage starts: at 4 and at 8.
    xs = [list(line.get_xdata()) for line in loss.lines]
    first, second, third = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11, 12, 13]
    assert [values for values in xs if len(values) > 2] == [first, first, second, second, third, third]
    assert [values for values in xs if len(values) == 2] == [[4, 4], [8, 8]]
    assert loss.lines[0].get_ydata() == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert loss.lines[1].get_ydata() == pytest.approx([0.65, 0.6, 0.5, 0.45])
    assert [text.get_text() for text in loss.texts] == ["round 1", "2", "rebirth"]
    assert [text.get_text() for text in axes_by_title["Rewards"].get_legend().get_texts()] == ["chosen", "rejected"]
    assert loss.get_legend() is None and loss.get_xlim() == (0, 13)


def test_both_rewards_over_the_root_of_the_divergence(tmp_path, monkeypatch, capsys):
    """KL 0.04 and 0.09; the reward model gains 1 and 0.5 more, the judge 12.5 and 37.5 points of Total in all."""
    summary = RunSummary(SFT, ROUNDS, kl={"round 1": 0.04, "round 2": 0.09})
    summary.add_proxy(1, 1.0)
    summary.add_proxy(2, 0.5)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_curves(RunRecord("run", summary, True, []), tmp_path / "curves.png")
    lines = [axes.lines[0] for axes in figures[0].axes if "reward model" in axes.get_title() + axes.get_ylabel()]
    lines += [axes.lines[0] for axes in figures[0].axes if "judge, points" in axes.get_ylabel()]
    assert [list(line.get_ydata()) for line in lines] == [[0, 1.0, 1.5], [0, 12.5, 37.5]]
    assert all(line.get_xdata() == pytest.approx([0, 0.2, 0.3]) for line in lines)
    log_summary(tmp_path, summary)
    written = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["proxy"] for line in written] == [0, 1.0, 1.5]
    print_summary(summary)
    assert "reward +1.00, +1.50 standard deviations by the reward model, Total -12.5, -37.5" in capsys.readouterr().out


def test_an_audit_of_known_clips_is_marked(capsys):
    audited = [RewardRound(0.75, 0.6, 0.9, 10, 0.7, 0.6, 10, 40, learned_clips=number) for number in (0, 2)]
    print_summary(RunSummary(SFT, ROUNDS, reward=audited))
    out = capsys.readouterr().out
    assert "rated 20 of 80 captions (60 calls saved); agreement on new captions by round, %: 75, 75* (*: also on" in out


def test_the_plot_has_the_colours_of_both_rewards(run_folder, tmp_path):
    plot_curves(read_run(run_folder), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        colours = dict((colour, count) for count, colour in image.convert("RGB").getcolors(1 << 24))
    assert colours[(0x0B, 0x69, 0xA8)] > 500 and colours[(0xD9, 0x8A, 0x00)] > 500


@pytest.fixture
def page_text(run_folder):
    write_page(read_run(run_folder), run_folder / "run.html")
    return (run_folder / "run.html").read_text()


def test_page(page_text):
    assert "<script" not in page_text and "&lt;script&gt;alert(1)" in page_text and "a &lt;run&gt;" in page_text
    assert "<b>62.5" not in page_text and "to &lt;b&gt;62.5&lt;/b&gt; %" in page_text
    rows = re.findall(r"<tr( class=\"best\")?><th scope=\"row\">([\w ]+?)<(.*?)</tr>", page_text, flags=re.DOTALL)
    cells = {name: re.findall(r">([-\d.]+)</td>", rest) for _, name, rest in rows[:4]}
    assert cells["SFT"] == ["50.0", "25.0", "75.0", "12.5", "40.0", "-"]
    assert cells["rebirth"] == ["30.0", "10.0", "40.0", "0.0", "70.0", "0.250"]
    assert [name for best, name, _ in rows if best] == ["round 2"]
    assert re.findall(r">([-\d.]+)</td>", rows[4][2]) == ["2", "0.375", "4.0", "2.0"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page_text) == [
        "Held-out rates, %", "Loss", "Rewards", "Gradient norm", "Learning rate",
    ]  # fmt: skip
    assert page_text.count("<svg role=") == 5 and "#00000" not in page_text
    assert len(set(re.findall(r' id="([^"]*)"', page_text))) == len(re.findall(r' id="[^"]*"', page_text))
    assert "no summary" not in page_text


def test_page_of_an_unfinished_run(run_folder):
    (run_folder / "summary.json").unlink()
    write_page(read_run(run_folder), run_folder / "run.html")
    text = (run_folder / "run.html").read_text()
    assert "has written no summary" in text and 'id="stages"' not in text and text.count("<svg role=") == 4


@needs_browser
def test_page_in_a_browser(page_text, run_folder):
    """The page makes no requests, fits a phone, and has other line colours in dark mode."""
    colours = {}
    with start_browser() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
            monitored = MonitoredPage(page)
            page.goto((run_folder / "run.html").as_uri())
            assert monitored.width() <= 390 and not monitored.errors
            assert all(url.startswith(("file:", "data:")) for url in monitored.requested)
            lines = page.locator("figure:has-text('Rewards') svg path")
            strokes = lines.evaluate_all("paths => paths.map(path => getComputedStyle(path).stroke)")
            colours[scheme] = set(strokes)
            assert page.locator("figure svg").count() == 5
    assert "rgb(11, 105, 168)" in colours["light"] and "rgb(86, 169, 224)" in colours["dark"]


def shown_values(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) as TensorBoard shows them."""
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]


@pytest.fixture
def event_seconds(monkeypatch):
    """Create event files a second apart, as in a real run: TensorBoard sorts them by name."""
    now = count(int(time.time()))
    clock = SimpleNamespace(time=lambda: next(now))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


@pytest.fixture
def stage(tmp_path, event_seconds):
    """The folder of a run that was killed while it wrote its fourth step, and TensorBoard's reader of it."""
    log = StepLog(tmp_path / "round_1", first_step=0)
    for step in range(3):
        log(step, {"loss": step + 0.5, "grad_norm": 10.0 * step})
    with (tmp_path / "round_1" / "steps.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    accumulator = EventAccumulator(str(tmp_path / "round_1"))
    accumulator.Reload()
    yield tmp_path / "round_1", accumulator
    log.close()


def test_logged_values_are_written_at_once(stage):
    folder, accumulator = stage
    lines = (folder / "steps.jsonl").read_text().splitlines()
    assert lines[:2] == [
        '{"step": 0, "loss": 0.5, "grad_norm": 0.0}',
        '{"step": 1, "loss": 1.5, "grad_norm": 10.0}',
    ]
    assert shown_values(accumulator, "loss") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert shown_values(accumulator, "grad_norm") == [(0, 0.0), (1, 10.0), (2, 20.0)]


@pytest.mark.parametrize(("first_step", "kept_values"), [(0, []), (2, [0.5, 1.5]), (3, [0.5, 1.5, 2.5])])
def test_a_resumed_log_has_every_step_once(stage, first_step, kept_values):
    """Steps from `first_step` on are repeated, with the value 100 instead of the earlier one."""
    folder, reader = stage
    path = folder / "steps.jsonl"
    log = StepLog(folder, first_step=first_step)
    assert [figures["loss"] for figures in read_steps(path)] == kept_values
    for step in range(first_step, 5):
        log(step, {"loss": 100.0})
    log.close()
    expected = list(enumerate(kept_values + [100.0] * (5 - first_step)))
    assert [(figures["step"], figures["loss"]) for figures in read_steps(path)] == expected
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 5
    assert shown_values(EventAccumulator(str(folder)), "loss") == expected == shown_values(reader, "loss")


def test_partial_lines_are_skipped(tmp_path):
    """A full disk truncates a line in the middle of the file, and the next one is appended to it."""
    path = tmp_path / "steps.jsonl"
    path.write_bytes(
        b'{"step": 0, "loss": 1.0}\n{"step": 1, "l{"step": 2, "loss": 3.0}\n\n7\n\xff\n{"step": 3, "kl": 0}\n'
    )
    assert read_steps(path) == [{"step": 0, "loss": 1.0}, {"step": 3, "kl": 0}]
    assert read_steps(tmp_path / "absent.jsonl") == []


def test_rounds_are_logged_by_number(tmp_path, event_seconds):
    start, better = Rates(0.5, 0.25, 0.75, 0.125), Rates(0.25, 0.25, 0.5, 0.0, qa_accuracy=0.625)
    reader = EventAccumulator(str(tmp_path))
    log_summary(tmp_path, RunSummary(start))
    assert shown_values(reader, "Total") == [(0, 0.75)]
    for summary in (RunSummary(start, [better]), RunSummary(start, [better], better, kl={"round 1": 0.375})):
        log_summary(tmp_path, summary)
    for accumulator in (EventAccumulator(str(tmp_path)), reader):
        assert shown_values(accumulator, "Total") == [(0, 0.75), (1, 0.5), (2, 0.5)]
        assert shown_values(accumulator, "Hallucination") == [(0, 0.25), (1, 0.25), (2, 0.25)]
        assert shown_values(accumulator, "Repetition") == [(0, 0.125), (1, 0.0), (2, 0.0)]
        assert shown_values(accumulator, "QA accuracy") == [(1, 0.625), (2, 0.625)]
        assert shown_values(accumulator, "KL") == [(1, 0.375)]
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["total"], line["kl"]) for line in lines] == [
        ("SFT", 0.75, None), ("round 1", 0.5, 0.375), ("rebirth", 0.5, None)
    ]  # fmt: skip


def test_rounding_of_16_bit_stages_is_logged(tmp_path):
    write_json(tmp_path / "round_2" / ROUNDING_NAME, {"kept": 0.5, "error": 0.75})
    log_summary(tmp_path, SUMMARY)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert {line["stage"]: line.get("rounding") for line in lines} == {
        "SFT": None, "round 1": None, "round 2": {"kept": 0.5, "error": 0.75}, "rebirth": None
    }  # fmt: skip
