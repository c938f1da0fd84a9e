"""`salmonn reward-benchmark` with the rule judge, with a language model on a fake server, and with bad input."""

import json
from pathlib import Path

import pytest
import torch

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.files import read_json
from salmonn.model.fingerprint import hash_model
from salmonn.preference.heads import ScalarHead
from salmonn.preference.reward_model import RewardInfo, head_width, save_reward_model
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


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    """A reward model that sees nothing: its reward is the negative number of an answer's tokens."""
    captioner = Captioner.load(SHIPPED_MODEL)
    head = ScalarHead(head_width(captioner, "rich"))
    with torch.no_grad():
        head.score.weight.zero_()
        head.score.weight[0, -2] = -1.0  # the last figures are the numbers of tokens and of unlikely ones
    folder = tmp_path_factory.mktemp("short")
    info = RewardInfo("bradley-terry", "rich", str(SHIPPED_MODEL), hash_model(captioner.network))
    save_reward_model(folder, head, info)
    return folder


def test_reward_model(call, write, tmp_path, monkeypatch, short_model):
    """It is as accurate with other clips, so each scenario is void; the clips are kept for the next model."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (*PAIRS[100:102], *PAIRS[1000:1002])]
    answers = [
        {"chosen": "A red circle.", "rejected": "A red circle appears."},
        {"chosen": "A low tone.", "rejected": "A."},
    ]
    lines = [json.dumps(row | texts) for row, texts in zip(rows, answers * 2, strict=True)]
    code, out, _ = call("reward-benchmark", write(lines), "--model", short_model, "--out", "b.json")
    table = shown(out)
    assert code == 0 and table["colour"][1] == table["silent"][1] == "50.0"
    assert table["helpful (void)"][7] == "50.0" and table["all (void)"][7] == "50.0"
    assert "abstain is void: with the clip the reward is right in 50.0 %, with another clip in 50.0 %" in out
    written = read_json(tmp_path / "b.json")
    assert written["credits"] == written["blind_credits"]
    assert list(written["credits"].values()) == [1, 0, 1, 0]
    assert len(list((tmp_path / "run" / "benchmark" / "seed_4" / "videos").iterdir())) == 2
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2 + 2  # both, and the picture alone


def test_a_reward_model_needs_clips(call, write, short_model):
    row = {"prompt": "Who?", "chosen": "A.", "rejected": "B.", "id": 7, "subset": "s"}
    code, _, err = call("reward-benchmark", write([json.dumps(row)]), "--model", short_model)
    assert code == 2 and "item 7 of s has no clip, which a reward model needs" in err
