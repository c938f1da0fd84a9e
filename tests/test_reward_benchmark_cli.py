"""`salmonn reward-benchmark` with the rule judge, with a language model on a fake server, and with bad input."""

import json
from pathlib import Path

import pytest

from salmonn.records import read_json
from tests.score.fake_llm_server import Answer, rule_judge_script
from tests.test_score_cli import shown

PAIRS = (Path(__file__).parents[1] / "data" / "reward_pairs.jsonl").read_text().splitlines()


@pytest.fixture
def write(tmp_path):
    """Write lines to a file."""

    def write(lines, name="pairs.jsonl"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    return write


def test_rule_judge(call, write, tmp_path):
    """What it can parse it judges right, times are ties, and it refuses sources."""
    code, out, err = call("reward-benchmark", write(PAIRS[::50]), "--out", tmp_path / "b.json")
    rows = shown(out)
    assert code == 0 and rows["colour"][:3] == ["2", "100.0", "34.2 - 100.0"] and rows["when"][:1] == ["2"]
    assert rows["when"][1] == "50.0" and rows["when"][3] == "100.0" and rows["source"][4] == "2"
    # helpful has four subsets; attribution is right in who, half right in when, and unscored in source
    assert rows["helpful"][:2] == ["8", "100.0"] and rows["attribution"][:2] == ["6", "50.0"]
    assert "4 items unscored, the first one together/together-0: the rule judge cannot read" in err
    written = read_json(tmp_path / "b.json")
    assert (written["format"], written["reward"], written["credits"]["when/when-0"]) == (1, "rule", 0.5)
    assert written["files"] == [str(tmp_path / "pairs.jsonl")] and written["scenarios"]["helpful"]["accuracy"] == 1


def test_language_model(call, write, tmp_path, serve):
    """Rows with events are judged by them, others compared in both orders; this model always prefers the first."""
    server = serve(rule_judge_script)
    row = {"prompt": "Who?", "chosen": "A.", "reject": "B."}
    files = (write(PAIRS[100:102]), write([json.dumps(row)], "reason.jsonl"))
    args = ("--judge", "openai", "--model", "m", "--base-url", server.url, "--cache", tmp_path / "c.sqlite")
    code, out, _ = call("reward-benchmark", *files, *args)
    rows = shown(out)
    assert code == 0 and rows["colour"][:2] == ["2", "100.0"] and rows["reason"][:2] == ["1", "50.0"]
    assert len(server.requests) == 2 * 2 + 2
    assert "verdicts for the answer shown first: 100.0 %; verdicts that changed with the order: 1" in out


def test_useless_replies(call, write, tmp_path, serve):
    """Both captions of a pair are unscored, and the pair counts once."""
    server = serve(lambda request, number: Answer("no"))
    args = ("--judge", "openai", "--model", "m", "--base-url", server.url, "--cache", tmp_path / "c.sqlite")
    _, out, err = call("reward-benchmark", write(PAIRS[:3]), *args, "--attempts", 1)
    assert shown(out)["all"][4] == "3"
    assert "3 items unscored, the first one left_out/left_out-0: no usable reply" in err


def test_bad_input(call, write, tmp_path):
    row = {"prompt": "Who?", "chosen": "A.", "rejected": "B.", "subset": "s", "id": 7}
    code, _, err = call("reward-benchmark", write([json.dumps(row)]))
    assert code == 2 and "item 7 of s has no events, which the rule judge needs: pass --judge openai" in err
    code, _, err = call("reward-benchmark", tmp_path / "absent.jsonl")
    assert code == 2 and "absent.jsonl" in err
