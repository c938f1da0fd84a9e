"""The best of several captions by a reward model; an ideal-point one is first fitted to the visitor's own votes."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

from salmonn.caption.engine import Engine
from salmonn.caption.generator import CaptionRequest, Span
from salmonn.media.container import ClipError
from salmonn.preference.comparisons import AnswerGroup, group_comparisons
from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.preference.ideal_point import Encoded
from salmonn.preference.mixture import MixtureHead
from salmonn.preference.rating import best_captions
from salmonn.preference.reward_model import RewardModel
from salmonn.records import Caption
from salmonn.train.raters import collect_votes

logger = logging.getLogger(__name__)
NUM_SAMPLES = 8
TEMPERATURE = 0.8  # of the samples, unless the visitor sets another one; that of Compare, which the votes are from
MAX_CACHED_GROUPS = 1000


@dataclass(frozen=True)
class ChosenCaption:
    """The caption with the highest reward, and why it was chosen.

    Args:
        caption: the caption.
        reward: its reward, in standard deviations above the mean of the training captions.
        mean_reward: mean reward of all captions to choose from.
        num_captions: number of these.
        num_votes: votes that the weights are fitted to; without any, they are those of the mean rater.
        prototypes: (description, weight) of each prototype of preference; empty if the reward is the same for all.
    """

    caption: Caption
    reward: float
    mean_reward: float
    num_captions: int
    num_votes: int = 0
    prototypes: tuple[tuple[str, float], ...] = ()


class CaptionChooser:
    """Chooses one of several captions of a clip. Any thread may use it.

    Args:
        model: reward model, whose base is the model of the engine.
        engine: engine that reads clips.
        feedback: people's feedback.
    """

    def __init__(self, model: RewardModel, engine: Engine, feedback: FeedbackStore) -> None:
        self.model = model
        self.engine = engine
        self.feedback = feedback
        head = model.head
        self._mean_rater = head if isinstance(head, MixtureHead) and len(head.weights) > 1 else None
        self._lock = threading.Lock()  # a GPU has memory for one forward pass
        # A few numbers for each caption that was voted on; the votes are read from the store each time.
        self._encode = lru_cache(maxsize=MAX_CACHED_GROUPS)(self._read_and_encode)

    @property
    def is_personal(self) -> bool:
        """Whether the reward depends on the visitor."""
        return self._mean_rater is not None

    @property
    def num_samples(self) -> int:
        """Number of captions to choose from."""
        return min(NUM_SAMPLES, self.engine.max_waiting)

    def to_samples(self, request: CaptionRequest) -> CaptionRequest:
        """Return a request for captions that differ: greedy decoding would make the same one each time."""
        sampling = request.sampling or self.model.captioner.default_sampling()
        return replace(request, sampling=replace(sampling, temperature=sampling.temperature or TEMPERATURE))

    def choose(self, captions: Sequence[Caption], request: CaptionRequest, *, rater: str) -> ChosenCaption:
        """Return the caption with the highest reward for a rater.

        Args:
            captions: samples of the request, at least one.
            request: the request, without a prompt of its own.
            rater: id of the rater; "" for none.

        Raises:
            ClipError: the clip cannot be read.
            RuntimeError: the model failed.
        """
        model, info, num_votes, prototypes = self.model, self.model.info, 0, list[tuple[str, float]]()
        if info.prototypes and self.is_personal:
            head, num_votes = self.fit(rater)
            model = RewardModel(model.captioner, head, info, name=model.name)
            descriptions = info.prototypes.descriptions or [""] * len(head.weights)
            prototypes += zip(descriptions, head.weights.tolist(), strict=True)
        clip, prompt = self.engine.read(request), model.captioner.default_prompt(request.modality)
        with self._lock:
            ratings = model.rate([replace(one, prompt=prompt) for one in captions], lambda _: clip)
        (best,) = best_captions(captions, ratings)
        values = {one.sample: one.value for one in ratings}
        mean = fmean(values.values())
        return ChosenCaption(best, values[best.sample], mean, len(captions), num_votes, tuple(prototypes))

    def fit(self, rater: str) -> tuple[MixtureHead, int]:
        """Fit the weights of the prototypes to a rater's votes; without any, they are the mean rater's.

        It takes milliseconds, except that the clips of new votes are read. Only for a personal reward.

        Args:
            rater: id of the rater; "" for none.

        Returns:
            The head for the rater, and the number of votes that it is fitted to.
        """
        assert self._mean_rater
        own = [one for one in self.feedback.read() if rater and one.rater == rater]
        groups, parts = list[AnswerGroup](), list[Encoded]()
        for group in group_comparisons(to_comparisons(own)[0]):
            try:
                parts.append(self._encode(group))
                groups.append(group)
            except (ClipError, OSError) as error:
                logger.warning("votes on a clip are not used: %s", error)
        votes = collect_votes(groups, dict.fromkeys((one for group in groups for one in group.raters), 0))
        return self._mean_rater.fit_rater(parts, votes), len(votes)

    def _read_and_encode(self, group: AnswerGroup) -> Encoded:
        """Encode the captions of a clip that a visitor voted on."""
        assert self._mean_rater
        one = group.example
        span = Span(one.start_seconds, one.end_seconds)
        clip = self.engine.read(CaptionRequest(self.feedback.folder / one.video, span=span, modality=one.modality))
        with self._lock:
            return self._mean_rater.encode(self.model.group_states(group, clip))
