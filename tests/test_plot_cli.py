"""`salmonn plot` from the command line."""

import subprocess
import sys
from dataclasses import asdict

import pytest

from salmonn.files import write_json, write_text
from salmonn.score.metrics import Rates
from tests.limits import RUN_SECONDS


@pytest.fixture
def run_folder(tmp_path):
    """An SFT run of two steps."""
    write_text(tmp_path / "run" / "steps.jsonl", '{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    write_json(tmp_path / "run" / "summary.json", asdict(Rates(0.5, 0.25, 0.75, 0.125, clips=3)))
    return tmp_path / "run"


def test_plot_beside_the_run(call, run_folder):
    code, out, err = call("plot", run_folder)
    assert code == 0 and "3 held-out clips" in out and "75.0" in out
    assert str(run_folder / "curves.png") in err and str(run_folder / "run.html") in err
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "2 steps" in (run_folder / "run.html").read_text()


def test_plot_elsewhere(call, run_folder, tmp_path):
    before = sorted(run_folder.iterdir())
    assert call("plot", run_folder, "--out", tmp_path / "new" / "folder")[0] == 0
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["curves.png", "run.html"]
    assert sorted(run_folder.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no run"), ("{", "is not the summary of a run"), ('{"rates": 1}', "unknown field rates")],
)
def test_wrong_usage_of_plot(call, tmp_path, text, message):
    if text:
        write_text(tmp_path / "summary.json", text)
    code, out, err = call("plot", tmp_path)
    assert code == 2 and err.startswith("error: ") and message in err and not out
    assert err.count("\n") == 1 and not list(tmp_path.glob("*.html"))


def test_help_of_plot(call):
    code, out, _ = call("plot", "--help")
    assert code == 0 and "--out" in out and "interrupted" in out


def test_plot_starts_without_torch(run_folder):
    code = f"import sys\ntry:\n from salmonn.cli import main; main(['plot', {str(run_folder)!r}])\n"
    code += "except SystemExit as end:\n assert end.code == 0\nassert 'torch' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr
