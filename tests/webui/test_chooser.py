"""The best of several captions for a visitor, with rewards by hand: prototype 1 rewards words, prototype 2 brevity."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.media.container import ClipError
from salmonn.model.pooling import AnswerStates
from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.heads import ScalarHead
from salmonn.preference.ideal_point import IdealPointConfig, IdealPointHead
from salmonn.preference.mixture import MixtureHead, PrototypeInfo
from salmonn.preference.reward_model import RewardInfo, RewardModel
from salmonn.records import Caption
from salmonn.webui.chooser import CaptionChooser, ChosenCaption
from salmonn.webui.rendering import render_reason
from tests.preference.feedback_examples import VOTE

LONG, MIDDLE, SHORT = "A dog barks and a cat sleeps.", "A dog barks loudly.", "A dog."
CAPTIONS = [Caption("a.mp4", text, model="toy", sample=number) for number, text in enumerate((MIDDLE, LONG, SHORT))]
REQUEST = CaptionRequest(Path("a.mp4"), modality="visual")
DESCRIPTIONS = ("words +1.00", "words -1.00")


class Reader:
    """A fake engine, which lists what it reads."""

    max_waiting = 32

    def __init__(self) -> None:
        self.requests: list[CaptionRequest] = []

    def read(self, request):
        self.requests.append(request)
        return request.path


@pytest.fixture
def words(monkeypatch):
    """Let the state of a caption be its number of words, and minus that number; return the prompts of all rows."""
    prompts = []

    def answer_states(captioner, rows, clips, *, pooling):
        prompts.extend(row.prompt for row in rows)
        numbers = torch.tensor([[float(len(row.answer.split()))] for row in rows])
        return AnswerStates(torch.zeros(len(rows), 1), torch.cat([numbers, -numbers], dim=1))

    monkeypatch.setattr("salmonn.preference.reward_model.answer_states", answer_states)
    return prompts


@pytest.fixture
def store(tmp_path):
    return FeedbackStore(tmp_path / "votes")


def make_chooser(head, store, **info):
    captioner = SimpleNamespace(default_prompt="Describe {}.".format, default_sampling=Sampling)
    model = RewardModel(captioner, head, RewardInfo("ideal-point", "mean", "base", "hash", **info))
    return CaptionChooser(model, Reader(), store)


@pytest.fixture
def chooser(words, store):
    head = IdealPointHead(2, 1, num_prototypes=2, config=IdealPointConfig())
    head.project = nn.Identity()
    prototypes = PrototypeInfo("score", 32, 64, 1, (0.75, 0.25), 0.8, DESCRIPTIONS)
    return make_chooser(MixtureHead(head, torch.tensor(prototypes.sizes)), store, prototypes=prototypes)


@pytest.fixture
def vote(store, tmp_path):
    """Vote for the shorter of two captions of a video."""

    def add(rater, video="a", *, is_kept=True, **changes):
        path = tmp_path / f"{video}.mp4"
        path.write_bytes(video.encode())
        first, second = (replace(VOTE.first, text=text) for text in (LONG, SHORT))
        one = replace(VOTE, first=first, second=second, choice="second", rater=rater, **changes)
        return store.add(one, path if is_kept else None)

    return add


def test_without_votes_of_theirs_a_visitor_has_the_mean_raters_weights(chooser, vote, words):
    """Reward (0.75 - 0.25) x words, of 4, 7 and 2 words. Neither others' votes count nor those on deleted videos."""
    vote("bob")
    vote("ann", is_kept=False)
    for rater in ("ann", ""):
        chosen = chooser.choose(CAPTIONS, REQUEST, rater=rater)
        assert chosen.caption == CAPTIONS[1] and chosen.num_votes == 0
        assert chosen.prototypes == (("words +1.00", 0.75), ("words -1.00", 0.25))
        assert (chosen.reward, chosen.mean_reward) == pytest.approx((3.5, 13 / 6))
    assert set(words) == {"Describe visual."}  # that of the request, as in generation
    assert [one.path.name for one in chooser.engine.requests] == ["a.mp4"] * 2  # no clip of a vote


def test_votes_change_the_choice(chooser, vote, store):
    """Three votes for brevity, on two clips, which are read once; without them, the choice is as before."""
    kept = [vote("ann", video, start_seconds=1.0, modality="audio") for video in "aab"]
    chosen = chooser.choose(CAPTIONS, REQUEST, rater="ann")
    assert chosen.caption == CAPTIONS[2] and chosen.num_votes == 3
    (_, first), (_, second) = chosen.prototypes
    assert second > 0.8 and first + second == pytest.approx(1)
    assert chosen.reward == pytest.approx(2 * (first - second))
    *read, last = chooser.engine.requests
    assert last == REQUEST and all((one.span, one.modality) == (Span(1.0), "audio") for one in read)
    assert {one.path for one in read} == {store.folder / "videos" / one.kept_video for one in kept} and len(read) == 2
    assert chooser.choose(CAPTIONS, REQUEST, rater="bob").caption == CAPTIONS[1]
    assert chooser.model.head.weights.tolist() == [0.75, 0.25]
    chooser.choose(CAPTIONS, REQUEST, rater="ann")
    assert chooser.engine.requests.count(REQUEST) == len(chooser.engine.requests) - 2
    store.forget("ann")
    assert chooser.choose(CAPTIONS, REQUEST, rater="ann").num_votes == 0


def test_votes_on_clips_that_cannot_be_read_are_left_out(chooser, vote, monkeypatch, caplog):
    for video in "ab":
        vote("ann", video)
    damaged = vote("ann", "c").kept_video
    read = chooser.engine.read

    def read_or_raise(request):
        if request.path.name == damaged:
            raise ClipError("it is damaged")
        return read(request)

    monkeypatch.setattr(chooser.engine, "read", read_or_raise)
    assert chooser.fit("ann")[1] == 2 and "votes on a clip are not used: it is damaged" in caplog.text


def test_a_plain_reward_is_the_same_for_all(words, vote, store):
    """Weights 0 and 1 of the two states: the reward is minus the number of words."""
    head = ScalarHead(2)
    chooser = make_chooser(head, store)
    with torch.no_grad():
        head.score.weight.copy_(torch.tensor([[0.0, 1.0]]))
    vote("ann")
    chosen = chooser.choose(CAPTIONS, REQUEST, rater="ann")
    assert not chooser.is_personal and (chosen.caption, chosen.num_votes, chosen.prototypes) == (CAPTIONS[2], 0, ())
    assert [one.path for one in chooser.engine.requests] == [REQUEST.path]


def test_samples_differ(chooser):
    assert chooser.to_samples(REQUEST).sampling.temperature == 0.8
    warm = replace(REQUEST, sampling=Sampling(temperature=1.2, top_p=0.5))
    assert chooser.to_samples(warm) == warm
    chooser.engine.max_waiting = 3
    assert chooser.num_samples == 3


def test_the_reason(chooser, vote):
    def reason(rater):
        return render_reason(chooser.choose(CAPTIONS, REQUEST, rater=rater))

    assert "The best of 3 captions for the mean rater</b>, as there is no vote of yours yet" in reason("ann")
    assert "reward +3.50, mean of all +2.17.</p>" in reason("ann")
    assert "Weights: prototype 1 (words +1.00) 75 %, prototype 2 (words -1.00) 25 %.</p>" in reason("ann")
    vote("ann")
    assert "The best of 3 captions for you</b>, by 1 vote of yours" in reason("ann")
    plain = render_reason(ChosenCaption(CAPTIONS[0], 1.0, -0.5, 3))
    assert "The best of 3 captions</b> by the reward model: reward +1.00, mean of all -0.50.</p>" in plain
    assert "Weights" not in plain
