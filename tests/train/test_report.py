"""The end of a run: summary.json's shape, the table, the picture."""

import json

import pytest

from salmonn.records import write_json
from salmonn.score.rates import Rates
from salmonn.train.report import Summary, plot_summary, print_table

SFT = Rates(missing=0.5, hallucination=0.25, total=0.75, repetition=0.125, qa_accuracy=0.4, clips=20)
ROUNDS = [Rates(0.375, 0.25, 0.625, 0.0625, 0.5, 20), Rates(0.25, 0.125, 0.375, 0.03125, 0.6, 20)]
REBIRTH = Rates(0.3, 0.1, 0.4, 0.0, 0.7, 20)


def as_json(*values):
    """The keys of summary.json, in words; those that are not given are as by default."""
    names = ("missing", "hallucination", "total", "repetition", "qa_accuracy", "clips")
    rest = {"incorrect": 0, "hallucinated": 0, "words": 0, "cut_off": 0, "captions": 0}
    return dict(zip(names, values, strict=True)) | rest | {"audio_share": None, "order": None}


def test_summary_json(tmp_path):
    write_json(tmp_path / "summary.json", Summary(SFT, ROUNDS, REBIRTH).to_json())
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "sft": as_json(0.5, 0.25, 0.75, 0.125, 0.4, 20),
        "rounds": [as_json(0.375, 0.25, 0.625, 0.0625, 0.5, 20), as_json(0.25, 0.125, 0.375, 0.03125, 0.6, 20)],
        "rebirth": as_json(0.3, 0.1, 0.4, 0.0, 0.7, 20),
    }


def test_stages_in_the_order_of_time():
    assert list(Summary(SFT, ROUNDS, REBIRTH).stages) == ["SFT", "round 1", "round 2", "rebirth"]
    assert list(Summary(SFT).stages) == ["SFT"]
    assert Summary(SFT, ROUNDS, REBIRTH).stages["round 2"] == ROUNDS[1]


def test_table_in_percent(capsys):
    print_table(Summary(SFT, ROUNDS[:1], Rates(0.3, 0.1, 0.4, 0.0, None, 20)))
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").strip(" │").split("│")]
        rows[cells[0]] = cells[1:]
    assert rows["SFT"] == ["50.0", "25.0", "75.0", "12.5", "40.0"]
    assert rows["round 1"] == ["37.5", "25.0", "62.5", "6.2", "50.0"]
    assert rows["rebirth"] == ["30.0", "10.0", "40.0", "0.0", "-"]
    assert rows["stage"] == ["Missing %", "Hallucination %", "Total %", "Repetition %", "QA accuracy %"]


@pytest.mark.parametrize("rebirth", [REBIRTH, None, Rates(0.3, 0.1, 0.4, 0.0, None, 20)])
def test_plot_writes_a_png(tmp_path, rebirth):
    plot_summary(Summary(SFT, ROUNDS, rebirth), tmp_path / "summary.png")
    data = (tmp_path / "summary.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000  # a drawing, no empty sheet
