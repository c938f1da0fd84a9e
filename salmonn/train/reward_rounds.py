"""A reward model in the rounds of mrDPO: the judge labels a few clips, the model rates all.

    round 1      the judge labels `seed_clips` -> the reward model is trained on their captions and rates all captions
    later        the judge audits some of the new captions -> agreement with the model; then it labels `refresh_clips`
                 further clips, and the model is trained again on all labels so far and rates all captions; with
                 `refresh` "on_demand", only if the agreement is low or uncertain

The policy's captions get better and longer each round, and the model of an earlier round has not seen such captions:
hence audit and refresh (arXiv 2405.07863, section 3.3). The base of every reward model is the run's start, whose
features all rounds share. Held-out clips stay with the judge.
"""

import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import fmean

import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.files import parse_record, read_json, read_records, write_json
from salmonn.model.layout import ClipFeatures
from salmonn.preference.agreement import Agreement, describe_agreement, looking_warning, measure_agreement
from salmonn.preference.claims import attach_credits
from salmonn.preference.comparisons import AnswerGroup, compare_ratings, group_comparisons
from salmonn.preference.mixture import choose_weights
from salmonn.preference.rating import Rating
from salmonn.preference.reward import JudgeReward, RewardConfig
from salmonn.preference.reward_model import (
    INFO_NAME,
    ModelReward,
    RewardInfo,
    RewardModel,
    read_info,
    require_base,
    require_frames,
)
from salmonn.records import Caption, Reference
from salmonn.train.data import ClipSet, ClipSource
from salmonn.train.evaluate import judge_captions
from salmonn.train.parallel import StrategyName
from salmonn.train.reward import RewardTrainer, RewardTrainingConfig
from salmonn.train.rounds import rate_captions
from salmonn.train.run_folder import is_missing
from salmonn.train.run_log import PROXY_NAME, REWARD_ROUND_NAME, RewardRound
from salmonn.train.sampling import CAPTIONS_NAME

log = logging.getLogger(__name__)
REWARD_DIR, LABELS_DIR, AUDIT_DIR = "reward", "labels", "audit"
AUDIT_NAME = "audit.json"  # in audit/: its result, by which a resumed run decides again as before
LABEL_FILES = (LABELS_DIR, AUDIT_DIR, REWARD_DIR, REWARD_ROUND_NAME)  # of a round, besides its ratings
MIN_GAP = 0.1  # difference of the judge's Totals from which a comparison counts
CHANCE = 0.5  # agreement that the interval of an audit must lie above


@dataclass(frozen=True)
class RewardRounds:
    """Labels, reward models and ratings of all rounds of a run.

    Args:
        config: shares of labelled clips, and weights.
        training: training of the reward model.
        judge: rates the labelled captions.
        clips: training clips with features.
        out: folder of the run.
        load: loads the run's start model.
        seed: random seed.
        strategy: distribution over processes.
    """

    config: RewardConfig
    training: RewardTrainingConfig
    judge: JudgeReward
    clips: ClipSet
    out: Path
    load: Callable[[], Captioner]
    seed: int = 0
    strategy: StrategyName = "ddp"

    @property
    def labeller(self) -> JudgeReward:
        """The judge's Total alone: repetition is counted in the text, where no model has to learn it."""
        return JudgeReward(self.judge.judge, repetition_weight=0.0)

    def rate(self, number: int, captions: Sequence[Caption]) -> tuple[list[Rating], RewardInfo]:
        """Rate the captions of a round, after audit, labelling and training as far as these are due.

        Every step writes its files to the folder of the round, and a restarted run loads them.

        Returns:
            Ratings by the reward model, and its description.
        """
        folder = self.folder(number)
        is_reported = not is_missing(folder / REWARD_ROUND_NAME)
        is_audited = number > 1 or self.config.model is not None
        audit = self._audit(number, captions) if is_audited and not is_reported else Audit()
        labelled = self._label(number, captions)
        if labelled and is_missing(folder / REWARD_DIR / INFO_NAME):
            self._train(number)
        model = self._model_folder(number)
        ratings = self._rate_by(model, captions, folder)
        info = read_info(model)
        if not is_reported:
            self._report(number, captions, info, audit, num_labelled=len(labelled))
        return ratings, info

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.out / f"round_{number}"

    def _num_labelled(self, number: int) -> int:
        """Return how many clips the judge is to label in a round.

        With refresh "on_demand", a later round must have been audited.
        """
        if number == 1:
            return self.config.seed_clips if self.config.model is None else 0
        if self.config.refresh == "on_demand" and not self._is_refresh_due(self._read_audit(number)):
            return 0
        return self.config.refresh_clips

    def _is_refresh_due(self, audit: "Audit") -> bool:
        """Return whether the agreement with the judge is too low or too uncertain to keep the reward model."""
        found = audit.agreement
        return found is None or found.accuracy < self.config.min_agreement or found.low < CHANCE

    def _read_audit(self, number: int) -> "Audit":
        """Read the result of a round's audit."""
        return parse_record(read_json(self.folder(number) / AUDIT_DIR / AUDIT_NAME), Audit)

    def _model_folder(self, number: int) -> Path:
        """Return the folder of the reward model that rates a round's captions: the last one that was trained."""
        trained = [one for one in range(1, number + 1) if self.labelled_videos(one)]
        if trained:
            return self.folder(trained[-1]) / REWARD_DIR
        assert self.config.model is not None, "the first round trains a model unless one is given"
        return self.config.model

    def labelled_videos(self, number: int) -> list[str]:
        """Return the videos whose captions the judge labels in a round; a round with any trains a reward model.

        No video is labelled in two rounds, so that they may run out.
        """
        usable = usable_videos(self.clips.references, self.judge)
        random.Random(f"{self.seed}-labels").shuffle(usable)
        counts = [self._num_labelled(one) for one in range(1, number + 1)]
        return usable[sum(counts[:-1]) : sum(counts)]

    def _label(self, number: int, captions: Sequence[Caption]) -> list[Rating]:
        """Let the judge rate all captions of the clips that are labelled in a round."""
        videos = set(self.labelled_videos(number))
        labelled = [caption for caption in captions if caption.video in videos]
        if not labelled:
            return []
        return rate_captions(labelled, self.clips, reward=self.labeller, folder=self.folder(number) / LABELS_DIR)

    def _train(self, number: int) -> None:
        """Train a reward model on the labels of all rounds so far.

        Raises:
            ValueError: no two captions of a labelled clip differ in the judge's Total.
        """
        groups: list[AnswerGroup] = []
        for one in range(1, number + 1):
            path = self.folder(one) / LABELS_DIR / self.labeller.file_name
            if not is_missing(path):
                captions = read_records(self.folder(one) / CAPTIONS_NAME, Caption)
                ratings = self.labeller.load(path)
                comparisons = compare_ratings(captions, ratings, min_gap=MIN_GAP, source=self.judge.name)
                scores = [rating.score for rating in ratings if rating.score]
                groups += attach_credits(group_comparisons(comparisons), captions, scores)
        if not groups:
            raise ValueError(
                f"no two captions of a labelled clip differ by {MIN_GAP} in the judge's Total: label more clips "
                "(reward.seed_clips), or sample at a higher temperature"
            )
        folder = self.folder(number) / REWARD_DIR
        trainer = RewardTrainer(self.load, self.training, folder, self.seed, self.strategy)
        info = trainer.train(groups, self.clips.features, root=self.clips.root)
        if info.agreement and dist.is_main():
            log.info("%s: the reward model %s", self.folder(number).name, describe_agreement(info.agreement))
            if warning := looking_warning(info.agreement):
                log.warning("%s", warning)

    def _rate_by(self, model: Path, captions: Sequence[Caption], folder: Path) -> list[Rating]:
        """Rate captions with a reward model on all ranks, or load the ratings of an earlier run."""
        if not is_missing(folder / ModelReward.file_name):
            return read_records(folder / ModelReward.file_name, Rating)
        return rate_captions(captions, self.clips, reward=self._load_reward(model, self.clips), folder=folder)

    def _load_reward(self, model: Path, clips: ClipSet) -> ModelReward:
        """Load a reward model that rates captions of clips."""

        def features(caption: Caption) -> ClipFeatures:
            return clips.features[ClipSource(clips.root / caption.video)]

        loaded = RewardModel.load(model, captioner=self.load(), prototype=self.config.prototype)
        return ModelReward(
            loaded,
            features,
            length_penalty=self.config.length_penalty,
            repetition_weight=self.config.repetition_weight,
            caution=self.config.caution,
        )

    def heldout_gain(self, number: int, heldout: ClipSet) -> float:
        """Return how much the reward of the held-out captions rose in a round, in standard deviations.

        The reward model of the round rates those of the stage before and those after it, whose Totals the judge has
        measured; or the result of an earlier run is loaded.
        """
        path = self.folder(number) / "heldout" / PROXY_NAME
        if is_missing(path):
            stages = (self.folder(number - 1) if number > 1 else self.out / "sft", self.folder(number))
            before, after = (read_records(stage / "heldout" / CAPTIONS_NAME, Caption) for stage in stages)
            reward = self._load_reward(self._model_folder(number), heldout)
            rated = judge_captions([*before, *after], heldout.by_video, judge=reward.rate)
            values = [one.main for one in rated if isinstance(one, Rating)]
            if dist.is_main():
                write_json(path, fmean(values[len(before) :]) - fmean(values[: len(before)]))
            dist.barrier()
        gain: float = read_json(path)
        return gain

    def _audit(self, number: int, captions: Sequence[Caption]) -> "Audit":
        """Compare the last reward model with the judge on some of the new captions, or load the result."""
        path = self.folder(number) / AUDIT_DIR / AUDIT_NAME
        if is_missing(path):
            audit = self._compare_on_new(number, captions)
            if dist.is_main():
                write_json(path, asdict(audit))
            dist.barrier()
        return self._read_audit(number)

    def _compare_on_new(self, number: int, captions: Sequence[Caption]) -> "Audit":
        folder, rng = self.folder(number) / AUDIT_DIR, random.Random(f"{self.seed}-audit-{number}")
        usable = set(usable_videos(self.clips.references, self.judge))
        by_video: dict[str, list[Caption]] = {}
        for caption in captions:
            if caption.video in usable:
                by_video.setdefault(caption.video, []).append(caption)
        model, spreads = self._model_folder(number - 1), dict[str, float]()
        if read_info(model).ensemble:
            rated = self._rate_by(model, [one for group in by_video.values() for one in group], folder)
            for video, ratings in groupby(rated, key=attrgetter("video")):
                spreads[video] = fmean(one.parts["spread"] for one in ratings)
        # Clips that the model has not learned from, as far as there are such.
        learned = {video for one in range(1, number) for video in self.labelled_videos(one)}
        count, unseen = min(self.config.audit_clips, len(by_video)), sorted(set(by_video) - learned)
        videos = draw_videos(unseen, min(count, len(unseen)), spreads=spreads, rng=rng)
        videos += draw_videos(sorted(set(by_video) & learned), count - len(videos), spreads=spreads, rng=rng)
        drawn = [
            caption
            for video in videos
            for caption in rng.sample(by_video[video], min(self.config.audit_samples, len(by_video[video])))
        ]
        gold = rate_captions(drawn, self.clips, reward=self.labeller, folder=folder)
        audit = compare_with_judge(drawn, gold, self._rate_by(model, drawn, folder))
        return replace(audit, num_clips=len(videos), num_learned=len(learned & set(videos)))

    def _report(
        self, number: int, captions: Sequence[Caption], info: RewardInfo, audit: "Audit", *, num_labelled: int
    ) -> None:
        """Write and log how the reward model agrees, and how many captions the judge was spared."""
        audited, heldout = audit.agreement, info.agreement
        reported = RewardRound(
            agreement=audited.accuracy if audited else None,
            low=audited.low if audited else None,
            high=audited.high if audited else None,
            audited_pairs=audited.num_comparisons if audited else 0,
            heldout_accuracy=heldout.accuracy if heldout else None,
            blind_accuracy=heldout.blind if heldout else None,
            num_judged=num_labelled + audit.num_captions,
            num_captions=len(captions),
            trained=num_labelled > 0,
            reason=self._explain_refresh(number, audit),
            audited_clips=audit.num_clips,
            learned_clips=audit.num_learned,
        )
        if not dist.is_main():
            return
        write_json(self.folder(number) / REWARD_ROUND_NAME, asdict(reported))
        name = self.folder(number).name
        log.info(
            "%s: the judge rated %d of %d captions, %d calls saved",
            name,
            reported.num_judged,
            len(captions),
            len(captions) - reported.num_judged,
        )
        if reported.reason:
            log.info("%s: %s", name, reported.reason)
        if audit.num_learned:
            log.warning(
                "%s: the reward model has learned from %d of the %d audited clips, as too few others have events that "
                "the judge can use: its agreement with the judge may be lower on other clips",
                name,
                audit.num_learned,
                audit.num_clips,
            )
        if audited is None:
            return
        log.info("%s: on new captions, the previous reward model %s", name, describe_agreement(audited, of="judged"))
        if audited.accuracy < self.config.min_agreement and not self.labelled_videos(number):
            has_run_out = self._num_labelled(number) > 0
            log.warning(
                "%s: the reward model agrees with %.0f %% of the judge's comparisons of new captions, below "
                "reward.min_agreement %.2f; %s",
                name,
                100 * audited.accuracy,
                self.config.min_agreement,
                "add events to more references"
                if has_run_out
                else "let the judge label further clips (reward.refresh_clips)",
            )

    def _explain_refresh(self, number: int, audit: "Audit") -> str:
        """Return why the reward model was trained again in a later round or was kept; "" if it is always trained."""
        if self._num_labelled(number) and not self.labelled_videos(number):
            return (
                "the reward model was kept, since the judge has labelled all clips whose events it can use; add events "
                "to more references to train it on new captions"
            )
        if number == 1 or self.config.refresh == "always":
            return ""
        decision = "trained again" if self._num_labelled(number) else "kept"
        if audit.agreement is None:
            return f"the reward model was {decision}, since no two audited captions of a clip differ in Total"
        return (
            f"the reward model was {decision}, since it agrees with {100 * audit.agreement.accuracy:.0f} % of the "
            f"judge's comparisons of new captions, and the 95 % interval starts at {100 * audit.agreement.low:.0f} %; "
            f"it is kept if the agreement is at least {100 * self.config.min_agreement:.0f} % (reward.min_agreement) "
            f"and the interval starts at {100 * CHANCE:.0f} % or above"
        )


@dataclass(frozen=True)
class Audit:
    """Agreement of a reward model with the judge on new captions.

    Args:
        num_captions: captions that the judge rated.
        agreement: on the pairs of captions of a clip that differ in the judge's Total; None without such pairs.
        num_clips: clips of these captions.
        num_learned: clips of these that the model has learned from, by other captions.
    """

    num_captions: int = 0
    agreement: Agreement | None = None
    num_clips: int = 0
    num_learned: int = 0


def compare_with_judge(captions: Sequence[Caption], gold: Sequence[Rating], rated: Sequence[Rating]) -> Audit:
    """Compare a reward model's ratings of captions with the judge's.

    Args:
        captions: audited captions.
        gold, rated: ratings of these captions by the judge and by the model, which may have rated others, too.
    """
    groups = group_comparisons(compare_ratings(captions, gold, min_gap=MIN_GAP, source=""))
    text_of = {(caption.video, caption.sample): caption.text for caption in captions}
    value_of = {
        (one.video, text_of[one.video, one.sample]): one.main for one in rated if (one.video, one.sample) in text_of
    }
    margins = [
        value_of[group.example.video, group.answers[better][0]] - value_of[group.example.video, group.answers[worse][0]]
        for group in groups
        for better, worse in group.pairs
    ]
    return Audit(len(captions), measure_agreement(groups, torch.tensor(margins), None) if margins else None)


def draw_videos(videos: Sequence[str], count: int, *, spreads: Mapping[str, float], rng: random.Random) -> list[str]:
    """Draw videos for an audit: half are those on which an ensemble disagrees most, the others are drawn at random.

    Args:
        videos: candidates, sorted.
        count: number of videos to draw.
        spreads: mean spread of the ratings of a video's captions; empty without an ensemble, to draw all at random.
        rng: random numbers.
    """
    disputed = sorted(videos, key=lambda video: -spreads[video])[: count // 2] if spreads else []
    others = [video for video in videos if video not in disputed]
    return disputed + rng.sample(others, count - len(disputed))


def usable_videos(references: Sequence[Reference], judge: JudgeReward) -> list[str]:
    """Return the videos whose references the judge can use, sorted; others need no events."""
    usable = []
    for reference in references:
        with suppress(ValueError):
            judge.check(reference)
            usable.append(reference.video)
    return sorted(usable)


def require_labels(references: Sequence[Reference], judge: JudgeReward, config: RewardConfig) -> None:
    """Raise ValueError if too few training clips have events for the first reward model."""
    num_usable = len(usable_videos(references, judge))
    required = 1 if config.model else config.seed_clips
    if num_usable < required:
        raise ValueError(
            f"the judge can rate captions of {num_usable} of {len(references)} training clips, fewer than {required} "
            "(reward.seed_clips): add events to more references, or lower it"
        )


def require_model(
    config: RewardConfig, captioner: Captioner, *, floors: Collection[str] = (), min_spreads: float | None = None
) -> None:
    """Raise ValueError if a run cannot use the reward model that is given for it, before hours of sampling.

    Args:
        config: reward of the run.
        captioner: start of the run.
        floors: objectives that chosen captions must reach.
        min_spreads: difference of the ratings of a pair in spreads of an ensemble.
    """
    if config.model:
        info = read_info(config.model)
        choose_weights(config.model, info.prototypes, prototype=config.prototype)
        require_base(config.model, info, captioner)
        require_frames(config.model, info, captioner)
        for name, value in (("reward.caution", config.caution), ("selection.min_spreads", min_spreads)):
            if value and not info.ensemble:
                raise ValueError(
                    f"{name} is {value}, but {config.model} has no ensemble of heads: train it with --ensemble 5, or "
                    f"leave {name} out"
                )
        if missing := [name for name in floors if name not in info.objectives]:
            raise ValueError(
                f"selection.floors names {', '.join(missing)}, which {config.model}, a {info.kind} reward model, does "
                "not have; train one with --kind objectives"
            )
