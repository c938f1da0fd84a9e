"""Rating while sampling, by a scripted judge behind a URL: requests overlap, and the ratings are the same."""

import threading

import pytest

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.preference.reward import JudgeReward, make_judge
from salmonn.records import Caption, Reference, Unscored
from salmonn.score.chat_client import LLMStoppedError
from salmonn.score.config import JudgeConfig
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.encoding import cache_features
from salmonn.train.rating_ahead import RatingAhead
from salmonn.train.rounds import rate_captions
from salmonn.train.sampling import SampleConfig, sample_captions
from tests.limits import STEP_SECONDS
from tests.score.fake_llm_server import Answer, rule_judge_script

SAMPLING = SampleConfig(temperature=1.0, max_new_tokens=12, num_samples=2, batch_size=4)


@pytest.fixture
def train(captioner, clips):
    (cached,) = cache_features(captioner, clips, name="clips")
    return cached


@pytest.fixture
def make_reward(tmp_path):
    """Make a reward whose judge asks a server, with a cache of its own."""

    def make(server, cache="cache.sqlite"):
        config = JudgeConfig(kind="openai", model="m", base_url=server.url, cache=tmp_path / cache, retry_seconds=1)
        return JudgeReward(make_judge(config), repetition_weight=1.0)

    return make


def sample_and_rate(captioner, clips, reward, folder):
    with RatingAhead(reward, judge=reward.judge, references=clips.by_video) as ahead:
        captions = sample_captions(captioner, clips, SAMPLING, name="test", folder=folder, on_part=ahead.add)
    return captions, rate_captions(captions, clips, reward=reward, folder=folder, ahead=ahead)


class Killed(Exception):
    """Raised where the process would be killed."""


def test_a_slow_judge_rates_while_the_next_part_is_sampled(captioner, train, serve, make_reward, tmp_path, monkeypatch):
    """The judge replies once the second of three parts has begun, which continues once a request has arrived."""
    generate, num_parts = Captioner.generate, []
    is_asked, is_sampling = threading.Event(), threading.Event()

    def generate_beside_judge(*args, **options):
        num_parts.append(1)
        if len(num_parts) == 2:
            is_sampling.set()
            assert is_asked.wait(STEP_SECONDS)
        return generate(*args, **options)

    def judge_beside_sampling(request, number):
        is_asked.set()
        assert is_sampling.wait(STEP_SECONDS)
        return rule_judge_script(request, number)

    monkeypatch.setattr(Captioner, "generate", generate_beside_judge)
    server = serve(judge_beside_sampling)
    captions, ratings = sample_and_rate(captioner, train, make_reward(server), tmp_path / "round_1")
    assert len(num_parts) == 3 and len(captions) == 10
    texts = {(caption.video, caption.text) for caption in captions if caption.text}
    assert len(server.requests) == len(texts)  # none twice
    afterwards = make_reward(serve(rule_judge_script), "other.sqlite")
    assert ratings == rate_captions(captions, train, reward=afterwards, folder=tmp_path / "other")
    scores = [(tmp_path / name / "scores.jsonl").read_text().splitlines()[1:] for name in ("round_1", "other")]
    assert scores[0] == scores[1] and len(scores[0]) == 10


def test_a_kill_loses_no_reply(captioner, train, serve, make_reward, tmp_path, monkeypatch):
    """Killed in the third part, after the first was rated; the resumed run asks only about what is new."""
    generate, num_parts = Captioner.generate, []
    is_rated = threading.Event()

    def generate_some(*args, **options):
        num_parts.append(1)
        if len(num_parts) == 3:
            assert is_rated.wait(STEP_SECONDS)
            raise Killed
        return generate(*args, **options)

    reward = make_reward(server := serve(rule_judge_script))
    rate = reward.rate

    def rate_and_tell(tasks):
        ratings = rate(tasks)
        is_rated.set()
        return ratings

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "generate", generate_some)
        patch.setattr(reward, "rate", rate_and_tell)
        with pytest.raises(Killed):
            sample_and_rate(captioner, train, reward, tmp_path / "round_1")
    assert len(server.requests) > 0
    captions, ratings = sample_and_rate(captioner, train, make_reward(server), tmp_path / "round_1")
    texts = {(caption.video, caption.text) for caption in captions if caption.text}
    assert len(server.requests) == len(texts) and len(ratings) == len(captions)


def test_an_error_of_the_judge_ends_the_run_after_sampling(captioner, train, serve, make_reward, tmp_path, caplog):
    server = serve(lambda request, number: Answer("no such model", status=404))
    with pytest.raises(LLMStoppedError, match="no such model"):
        sample_and_rate(captioner, train, make_reward(server), tmp_path / "round_1")
    assert (tmp_path / "round_1" / "captions.jsonl").is_file() and "rating has stopped" in caplog.text


def test_ranks_rate_any_numbers_of_captions(monkeypatch):
    """Rank 0 has fewer than rank 1, as after a resumed run, whose finished parts cost nothing."""
    reward = JudgeReward(RuleJudge(), repetition_weight=1.0)
    ahead = RatingAhead(reward, judge=reward.judge, references={})
    rated = {(video, 0): Unscored(video, "none") for video in "abc"}
    ahead._ratings = {("a", 0): rated["a", 0]}
    others = [(key, rated[key]) for key in rated if key[0] != "a"]
    monkeypatch.setattr(dist, "_all_gather", lambda items: [list(items), [others]])
    assert ahead.gather() == rated


def test_a_rule_judge_does_not_rate_ahead():
    """It would compete with sampling for the processor."""
    reward = JudgeReward(RuleJudge(), repetition_weight=1.0)
    with RatingAhead(reward, judge=reward.judge, references={"a": Reference("a")}) as ahead:
        ahead.add([Caption("a", "A star.")])
    assert ahead.gather() == {}
