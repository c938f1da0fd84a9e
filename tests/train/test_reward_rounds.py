"""A reward model in the rounds: which clips are labelled, the audit by hand, and the guard against exploiting it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.files import parse_record, read_json, write_records
from salmonn.model.fingerprint import hash_model
from salmonn.preference.heads import ScalarHead
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward, RewardConfig
from salmonn.preference.reward_model import RewardInfo, RewardModel, head_width, save_reward_model
from salmonn.records import Caption, Event, Reference
from salmonn.score.formats import read_scores
from salmonn.score.metrics import Rates
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.data import ClipSet, ClipSource
from salmonn.train.encoding import cache_features
from salmonn.train.reward import RewardTrainingConfig, rotate_features
from salmonn.train.reward_rounds import RewardRounds, compare_with_judge, draw_videos, require_labels
from salmonn.train.rounds import over_optimization
from salmonn.train.run_log import RewardRound, RunSummary

JUDGE = JudgeReward(RuleJudge(), repetition_weight=1.0)
EVENT = Event("a red circle appears")


def make_rounds(references: list[Reference], **options) -> RewardRounds:
    config = RewardConfig(kind="model", **options)
    return RewardRounds(config, RewardTrainingConfig(), JUDGE, ClipSet(references, Path()), Path(), load=None)


def test_clips_are_labelled_once_and_need_events():
    references = [Reference(f"{number}.mp4", (EVENT,) if number < 7 else (Event("nonsense"),)) for number in range(9)]
    rounds = make_rounds(references, seed_clips=3, refresh_clips=2)
    labelled = [rounds.labelled_videos(number) for number in (1, 2, 3, 4)]
    assert [len(videos) for videos in labelled] == [3, 2, 2, 0]
    assert sorted(video for videos in labelled for video in videos) == [f"{number}.mp4" for number in range(7)]
    assert make_rounds(references, seed_clips=3, refresh_clips=0).labelled_videos(2) == []
    assert make_rounds(references, refresh_clips=2, model=Path("x")).labelled_videos(1) == []
    with pytest.raises(ValueError, match="captions of 7 of 9 training clips, fewer than 8"):
        require_labels(references, JUDGE, RewardConfig(kind="model", seed_clips=8))


def rating(video: str, sample: int, value: float) -> Rating:
    return Rating(video, {"reward": value}, {"reward": 1.0}, sample)


def test_an_audit_by_hand():
    """The judge orders 0 < 1 < 2, save that 1 and 2 differ by less than 0.1; the model has 0 < 2 and 1 < 0."""
    captions = [Caption("a", f"text {sample}", "p", sample=sample) for sample in range(3)]
    gold = [rating("a", sample, value) for sample, value in enumerate((0.0, 0.5, 0.55))]
    rated = [rating("a", sample, value) for sample, value in enumerate((1.0, 0.0, 2.0))]
    audit = compare_with_judge(captions, gold, rated)
    found = audit.agreement
    assert (audit.num_captions, found.num_comparisons, found.accuracy, found.longest) == (3, 2, 0.5, 0.5)
    assert 0 < found.low < 0.5 < found.high < 1
    assert compare_with_judge(captions, gold[:1], rated).agreement is None


@dataclass(frozen=True)
class KnownRounds(RewardRounds):
    """Rounds whose models are not trained, and rate the right caption of a share of clips higher in an audit."""

    shares: Mapping[str, float] = field(default_factory=dict)  # name of a round -> share
    spreads: Mapping[str, float] = field(default_factory=dict)  # name of a video -> of its captions' ratings
    trainings: list[int] = field(default_factory=list)

    def _train(self, number):
        self.trainings.append(number)
        info = RewardInfo("bradley-terry", "last", "base", "hash", ensemble=2 if self.spreads else 0)
        save_reward_model(self.folder(number) / "reward", ScalarHead(2), info)

    def _rate_by(self, model, captions, folder):
        videos = sorted({caption.video for caption in captions})
        num_right = round(self.shares.get(folder.parent.name, 1.0) * len(videos))
        values = {video: 1 if place < num_right else -1 for place, video in enumerate(videos)}
        rated = [rating(one.video, one.sample, values[one.video] * (1 - one.sample)) for one in captions]
        return [
            replace(one, parts={**one.parts, "spread": self.spreads[one.video]}, weights={**one.weights, "spread": 0})
            if self.spreads
            else one
            for one in rated
        ]


def known_rounds(out: Path, shares: Mapping[str, float] | None = None, *, num_clips=12, **options) -> KnownRounds:
    """Rounds of 12 clips with two captions each: a right one, then a wrong one."""
    references = [Reference(f"{number:02}.mp4", (EVENT,)) for number in range(num_clips)]
    options = {"seed_clips": 2, "refresh_clips": 3, "audit_clips": 6, "audit_samples": 2} | options
    return KnownRounds(
        **{one.name: getattr(make_rounds(references, **options), one.name) for one in fields(RewardRounds)}
        | {"out": out},
        shares=shares or {},
    )


def rate_round(rounds: KnownRounds, number: int) -> RewardRound:
    captions = [
        Caption(one.video, text, "p", sample=sample)
        for one in rounds.clips.references
        for sample, text in enumerate(("A red circle appears.", "A blue star disappears."))
    ]
    write_records(rounds.folder(number) / "captions.jsonl", captions)
    rounds.rate(number, captions)
    return parse_record(read_json(rounds.folder(number) / "reward_round.json"), RewardRound)


@pytest.mark.parametrize(
    ("share", "min_agreement", "trained", "reason"),
    [
        (1.0, 0.65, False, "was kept, since it agrees with 100 % of the judge's comparisons of new captions"),
        (1.0, 1.0, False, "starts at 61 %; it is kept if the agreement is at least 100 % (reward.min_agr"),
        (0.5, 0.65, True, "was trained again, since it agrees with 50 %"),
        (5 / 6, 0.65, True, "agrees with 83 % of the judge's comparisons of new captions, and the 95 % interval"),
    ],
)
def test_a_model_is_trained_again_on_demand(tmp_path, share, min_agreement, trained, reason):
    """Wilson's interval of 6 of 6 clips starts at 0.61, that of 5 of 6 at 0.44, whatever min_agreement is."""
    rounds = known_rounds(tmp_path, {"round_2": share}, refresh="on_demand", min_agreement=min_agreement)
    first, second = (rate_round(rounds, number) for number in (1, 2))
    assert (first.trained, first.reason, first.num_judged) == (True, "", 4)
    assert second.trained is trained and reason in second.reason
    assert second.num_judged == 12 + (6 if trained else 0)  # the audit's 6 times 2, and 3 clips with two captions each
    assert rounds.trainings == ([1, 2] if trained else [1])


def test_no_label_is_skipped_by_a_round_that_keeps_its_model(tmp_path):
    """A resumed run decides from the audit that it has written, without judging again."""
    shares = {"round_2": 1.0, "round_3": 0.0, "round_4": 1.0}
    rounds = known_rounds(tmp_path, shares, refresh="on_demand")
    assert [rate_round(rounds, number).trained for number in (1, 2, 3, 4)] == [True, False, True, False]
    labelled = [rounds.labelled_videos(number) for number in (1, 2, 3, 4)]
    always = known_rounds(tmp_path / "always", shares)
    assert labelled == [always.labelled_videos(1), [], always.labelled_videos(2), []]
    (tmp_path / "round_4/reward_round.json").unlink()
    for path in tmp_path.glob("round_*/audit/*"):
        if path.name != "audit.json":
            path.unlink()
    resumed = replace(rounds, shares={}, trainings=[])
    assert [rate_round(resumed, number).trained for number in (1, 2, 3, 4)] == [True, False, True, False]
    assert resumed.trainings == [] and not list(tmp_path.glob("round_*/audit/scores.jsonl"))


def test_a_model_is_always_trained_again_by_default(tmp_path):
    rounds = known_rounds(tmp_path)
    assert [rate_round(rounds, number).reason for number in (1, 2)] == ["", ""] and rounds.trainings == [1, 2]


@pytest.mark.parametrize("refresh", ["always", "on_demand"])
def test_labels_run_out(tmp_path, caplog, refresh):
    """Of 5 clips, 2 are labelled in round 1 and 3 in round 2; the audit of round 2 needs one that was learned from."""
    caplog.set_level("INFO")
    rounds = known_rounds(tmp_path, {"round_2": 0.0, "round_3": 0.0}, num_clips=5, audit_clips=4, refresh=refresh)
    found = [rate_round(rounds, number) for number in (1, 2, 3)]
    assert [(one.audited_clips, one.learned_clips) for one in found] == [(0, 0), (4, 1), (4, 4)]
    assert [one.trained for one in found] == [True, True, False] and rounds.trainings == [1, 2]
    assert [one.num_judged for one in found] == [4, 6 + 8, 8]
    assert found[2].reason.startswith("the reward model was kept, since the judge has labelled all clips whose events")
    assert f"round_3: {found[2].reason}" in caplog.messages
    warned = [message.partition(" clips")[0] for message in caplog.messages if "audited clips" in message]
    assert warned == [
        f"round_{number}: the reward model has learned from {learned} of the 4 audited"
        for number, learned in ((2, 1), (3, 4))
    ]
    low = [message for message in caplog.messages if "below reward.min_agreement" in message]
    assert len(low) == 1 and low[0].startswith("round_3: ") and low[0].endswith("add events to more references")


def test_half_of_an_audit_is_where_the_ensemble_disagrees_most():
    videos, spreads = ["a", "b", "c", "d", "e"], {"a": 0.1, "b": 0.9, "c": 0.2, "d": 0.8, "e": 0.3}
    drawn = [draw_videos(videos, 4, spreads=spreads, rng=Random(seed)) for seed in range(20)]
    assert all(set(one[:2]) == {"b", "d"} and len(set(one)) == 4 for one in drawn)
    assert {video for one in drawn for video in one[2:]} == {"a", "c", "e"}
    at_random = draw_videos(videos, 3, spreads={}, rng=Random(7))
    assert at_random == Random(7).sample(videos, 3)  # as before there were ensembles
    assert draw_videos([], 0, spreads=spreads, rng=Random(7)) == []


def test_an_ensemble_chooses_what_is_audited(tmp_path):
    """Of the clips that are not labelled; the mean spread of a clip's two captions counts."""
    plain = known_rounds(tmp_path / "plain")
    learned = plain.labelled_videos(1)
    others = sorted({one.video for one in plain.clips.references} - set(learned))
    spreads = dict.fromkeys(learned, 9.0) | {video: float(place) for place, video in enumerate(others)}
    rounds = replace(plain, out=tmp_path / "ensemble", spreads=spreads)
    found = [rate_round(rounds, number) for number in (1, 2)][1]
    scores = read_scores(tmp_path / "ensemble/round_2/audit/scores.jsonl").scores
    audited = {score.video for score in scores}
    assert len(audited) == 6 and set(others[-3:]) <= audited and not audited & set(learned)
    assert (found.audited_pairs, found.num_judged, len(scores)) == (6, 12 + 6, 12)


def test_the_blind_twin_gets_other_videos():
    """Not another modality or part of the same video."""
    parts = [
        ClipSource(Path("a"), "audio"),
        ClipSource(Path("a"), start_seconds=3.0),
        ClipSource(Path("a")),
        ClipSource(Path("b")),
        ClipSource(Path("c")),
    ]
    rotated = rotate_features({part: part for part in parts})
    assert [rotated[part].video.name for part in parts] == ["b", "b", "b", "c", "a"]


def test_the_gain_on_held_out_captions(captioner, random_model, clips, tmp_path):
    """By the round's reward model, the captions after it minus those before it; the result is kept."""
    (heldout,) = cache_features(captioner, ClipSet(clips.references[:2], clips.root), name="clips")
    torch.manual_seed(3)
    head = ScalarHead(head_width(captioner, "last"))
    info = RewardInfo("bradley-terry", "last", str(random_model), hash_model(captioner.network), std=2.0)
    save_reward_model(tmp_path / "round_1" / "reward", head, replace(info, frames=captioner.processor.frames))
    texts = {"sft": "A tone.", "round_1": "A red circle leaves."}
    captions = {
        stage: [Caption(one.video, text, "Tell.") for one in heldout.references] for stage, text in texts.items()
    }
    for stage, own in captions.items():
        write_records(tmp_path / stage / "heldout" / "captions.jsonl", own)
    model = RewardModel(captioner, head, info)
    values = {
        stage: fmean(
            one.value for one in model.rate(own, lambda caption: heldout.features_of(heldout.by_video[caption.video]))
        )
        for stage, own in captions.items()
    }
    rounds = replace(make_rounds(heldout.references), out=tmp_path, load=lambda: Captioner.load(random_model))
    gain = rounds.heldout_gain(1, heldout)
    assert gain == pytest.approx(values["round_1"] - values["sft"], abs=1e-5) and abs(gain) > 0.01
    assert replace(rounds, load=None).heldout_gain(1, heldout) == gain


def rates(total: float, *, missing: float = 0.3, words: float = 40) -> Rates:
    return Rates(
        missing=missing, incorrect=0, hallucinated=0, hallucination=0, total=total, repetition=0, clips=1, words=words
    )


@pytest.mark.parametrize(
    ("stages", "gains", "reason"),
    [
        ([rates(0.5), rates(0.45), rates(0.4)], [1.5, 1.5], None),  # Total falls with it
        ([rates(0.6), rates(0.595), rates(0.6)], [1.0, 1.5], "rose by a standard deviation in rounds 1 and 2"),
        ([rates(0.6), rates(0.595), rates(0.6)], [0.9, 1.5], None),  # once only
        ([rates(0.6), rates(0.5), rates(0.5)], [1.0, 1.5], None),  # once: the first gain was earned
        ([rates(0.6), rates(0.5, words=61)], [0.5], "captions have 61 words, up from 40"),
        ([rates(0.6), rates(0.5, words=61, missing=0.2)], [0.5], None),
        ([rates(0.6), rates(0.6, words=90)], [], None),  # rated by the judge
    ],
)
def test_rounds_that_exploit_the_reward_model(stages, gains, reason):
    one = RewardRound(0.7, 0.6, 0.8, 50, 0.75, 0.69, 10, 100)
    summary = RunSummary(sft=stages[0], rounds=stages[1:], reward=[one] * len(gains))
    for number, gain in enumerate(gains, start=1):
        summary.add_proxy(number, gain)
    found = over_optimization(summary)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": Path("x")}, "only used with --reward.kind model"),
        ({"kind": "model", "seed_clips": 1}, "seed_clips and audit_samples must be at least 2"),
        ({"kind": "model", "min_confidence": 1.0}, "min_confidence must be from 0.5 to below 1"),
        ({"kind": "model", "caution": -1.0}, "length_penalty and caution must be at least 0"),
        ({"refresh": "on_demand"}, "reward.refresh on_demand has no effect with reward.kind judge"),
        ({"kind": "model", "refresh": "on_demand", "refresh_clips": 0}, "no effect with reward.refresh_clips 0"),
        ({"caution": 1.0}, "reward.caution 1.0 has no effect with reward.kind judge"),
        ({"kind": "model", "voter": "cycle"}, "reward.voter cycle has no effect with reward.kind model"),
        ({"kind": "model", "prototype": 2, "refresh_clips": 0}, "reward.prototype 2 needs --reward.model"),
        ({"kind": "model", "prototype": "worst", "refresh_clips": 0}, "reward.prototype worst needs --reward.model"),
        ({"kind": "model", "prototype": 2, "model": Path("run/raters")}, "--reward.refresh-clips 0, since the judge"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)
