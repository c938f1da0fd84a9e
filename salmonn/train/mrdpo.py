"""Settings of an mrDPO run, and the clips it trains and evaluates on; recipes/mrdpo.py is the run itself."""

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from salmonn.caption.captioner import SHIPPED_MODEL
from salmonn.caption.processor import Processor
from salmonn.config import MAY_CHANGE
from salmonn.model.lora import LoraConfig
from salmonn.preference.losses import DIFFERENCE_LOSSES, LossConfig
from salmonn.preference.rating import Reward
from salmonn.preference.reward import RewardConfig
from salmonn.preference.selection import SelectionConfig
from salmonn.preference.subset import SubsetConfig
from salmonn.records import Reference
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import Judge
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import ClipSet, check_texts, drop_sounds, heldout_config, read_clips, render_clips
from salmonn.train.dry_run import print_adapter_plan
from salmonn.train.influence import split_clips
from salmonn.train.kl import KLConfig
from salmonn.train.loop import FitConfig
from salmonn.train.reward import RewardTrainingConfig
from salmonn.train.round_time import EstimateConfig, make_work, print_hours
from salmonn.train.rounds import EarlyStopConfig
from salmonn.train.run_folder import RunConfig
from salmonn.train.sampling import SampleConfig
from salmonn.train.server_sampling import SamplerConfig, ServerSampler
from salmonn.train.sharded import check_sharded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RebirthConfig:
    """Fine-tuning on the best model's captions of the training clips, and on questions.

    Args:
        start: model to fine-tune, the student: the run's start, or the best round's model.
        lora: adapter, merged at the end.
        fit: optimization.
        tailor: how the captions are made to suit the student (ARTE, arXiv 2406.19227). "none": the teacher's, which is
            the best round's model. "draft": of several samples, the one with the largest influence on the student.
            "teacher": those of the teacher after DPO on samples of large and small influence; "random" is its control,
            with the influences of a clip's samples exchanged at random.
        preference_fraction: fraction of the training clips on which influence is measured, and which the student does
            not learn from; without effect on tailor "none".
        teacher_steps: steps of the teacher's DPO, with the settings of the rounds.
    """

    start: Literal["start", "best"] = "start"
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, learning_rate=1e-3, warmup_ratio=0.1))
    tailor: Literal["none", "draft", "teacher", "random"] = "none"
    preference_fraction: float = 0.15
    teacher_steps: int = 25

    def __post_init__(self) -> None:
        if not 0 < self.preference_fraction < 1 or self.teacher_steps < 1:
            raise ValueError(
                "rebirth.preference_fraction must be between 0 and 1 and rebirth.teacher_steps at least 1, got "
                f"{self.preference_fraction} and {self.teacher_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class MrDpoConfig(RunConfig):
    """A run of mrDPO.

    Args:
        model: folder or hub id of the model to start from; the built-in toy model by default.
        references: JSONL of references (events, caption, questions) to training videos; none renders synthetic clips.
        heldout_references: references to held-out videos; none renders synthetic clips.
        clips_dir: folder of synthetic clips.
        synth: synthetic training clips; held-out clips are like them, from a different seed.
        heldout_clips: number of synthetic held-out clips.
        kl: measurement of the KL divergence; may change when a run is resumed.
        rounds: number of rounds of DPO.
        fresh_pairs: sample and pair captions in each round; otherwise all rounds train on the first round's pairs.
        reference_policy: policy that rewards are relative to: the start of the round, the start of the run, or a
            mixture of both ("mixed"), which anchors the rounds: Nash learning from preferences, with loss.kind nash.
        eta: weight of the run's start in the mixture, against 1 for the start of the round.
        extrapolate: train each round twice from the same start, as Mirror Prox (arXiv 2505.19731) does: first on the
            win rates of its captions against one another, then on their win rates against captions of the model that
            results. Needs loss.kind nash.
        qa_fraction: fraction of the last round's examples that are questions on the training clips.
        sampling: sampling of captions.
        sampler: where captions of the training clips are sampled.
        judge: judge of captions.
        reward: reward that captions are rated by.
        reward_training: training of the reward model, for reward.kind "model".
        selection: selection of preference pairs.
        subset: subset of these pairs that is trained on.
        loss: loss of the rounds.
        lora: fresh adapter of each round.
        fit: optimization of each round.
        learning_rate_decay: factor of the learning rate from each round to the next.
        last_round_weight: factor of the last round's update when it is merged; 0.5 gives the mean of the models of the
            last two rounds (model soups, arXiv 2203.05482).
        early_stopping: rules that stop the rounds early.
        estimate: what `dry_run` estimates the hours of a round for.
        load_sharded: load only a part of the weights into each process, for models that do not fit on one GPU; see
            `check_sharded`.
        rebirth: the last stage; none to skip it.
    """

    out: Path = Path("run")
    model: str = str(SHIPPED_MODEL)
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = field(default=Path("run/clips"), metadata=MAY_CHANGE)
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=320, seed=11))
    heldout_clips: int = 200
    kl: KLConfig = field(default_factory=KLConfig, metadata=MAY_CHANGE)
    rounds: int = 3
    fresh_pairs: bool = True
    reference_policy: Literal["round_start", "run_start", "mixed"] = "round_start"
    eta: float = 0.5
    extrapolate: bool = False
    qa_fraction: float = 0.0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_training: RewardTrainingConfig = field(
        default_factory=lambda: RewardTrainingConfig(kind="claims", pooling="clauses")
    )
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=60, learning_rate=2e-4, warmup_ratio=0.1, batch_size=16)
    )
    learning_rate_decay: float = 1.0
    last_round_weight: float = 1.0
    early_stopping: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig, metadata=MAY_CHANGE)
    load_sharded: bool = False
    rebirth: RebirthConfig | None = field(default_factory=RebirthConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_sharded:
            check_sharded(self)
        self._check_rounds()
        if self.references and not self.heldout_references:
            raise ValueError(
                "references are given without heldout_references, so synthetic clips would decide which round is best; "
                "move the lines of some videos (about a tenth) to a separate file, and pass it as "
                "--heldout-references"
            )
        if self.sampling.num_samples < 2 or not all(self.sampling.shares()):
            raise ValueError(
                "pairs need different captions of a clip: sampling.num_samples must be at least 2 and "
                f"sampling.temperature above 0, got {self.sampling.num_samples} and {self.sampling.temperature}"
            )
        self._check_reward_model()
        self._check_selection()
        self._check_loss()
        if self.rebirth and self.rebirth.tailor in ("teacher", "random"):
            try:
                _ = self.teacher_loss
            except ValueError as error:
                raise ValueError(
                    f"rebirth.tailor {self.rebirth.tailor} trains the teacher by guided DPO with the same loss.beta: "
                    f"{error}"
                ) from error
        if self.reward_training.kind in ("objectives", "ideal-point"):
            raise ValueError(
                f"reward_training.kind {self.reward_training.kind} cannot be trained on the judge's labels of a round; "
                "use claims, bradley-terry or pairwise, or train the model with recipes/reward.py and pass it as "
                "--reward.model"
            )
        if not 0 <= self.qa_fraction < 1 or (self.qa_fraction and not 0 < self.num_questions < self.fit.batch_size):
            raise ValueError(
                f"qa_fraction {self.qa_fraction} of batch_size {self.fit.batch_size} leaves no question or no pair in "
                "a step; choose a fraction from 0 to 1 that leaves both, or 0"
            )

    def _check_rounds(self) -> None:
        """Raise ValueError if the number of rounds, or a factor that differs between them, is out of range."""
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not 0 < self.learning_rate_decay < math.inf:
            raise ValueError(f"learning_rate_decay must be above 0, got {self.learning_rate_decay}")
        if not 0 < self.last_round_weight <= 1:
            raise ValueError(f"last_round_weight must be above 0 and at most 1, got {self.last_round_weight}")

    def _check_loss(self) -> None:
        """Raise ValueError if the loss does not suit the reference policy, the pairs or the reward."""
        if self.loss.kind == "grpo" and not (self.fresh_pairs and self.reference_policy == "round_start"):
            raise ValueError(
                "loss.kind grpo trains on the round's own samples, relative to the policy that wrote them; set "
                "fresh_pairs true and reference_policy round_start"
            )
        if self.extrapolate and not (self.loss.kind == "nash" and self.fresh_pairs):
            raise ValueError(
                "extrapolate rates each round's captions by their win rates against those of another model; set "
                "loss.kind nash and fresh_pairs true, or leave extrapolate out"
            )
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be above 0, got {self.eta}")
        if self.loss.per == "clause" and self.reference_policy == "mixed":
            raise ValueError("reference_policy mixed mixes whole captions; set loss.per caption")
        if self.loss.per == "clause" and (self.reward.kind != "judge" or not self.fresh_pairs):
            raise ValueError(
                "loss.per clause needs the judge's quotes of each round's captions; use --reward.kind judge and "
                "fresh_pairs true, or set loss.per caption"
            )
        if self.reference_policy == "mixed" and self.loss.kind not in DIFFERENCE_LOSSES:
            raise ValueError(
                f"loss.kind {self.loss.kind} depends on more than the difference of two log-ratios, which a mixed "
                f"reference policy leaves undetermined; use {', '.join(DIFFERENCE_LOSSES)}, or reference_policy "
                "round_start"
            )
        if self.loss.kind == "nash" and self.reward.kind != "voter":
            raise ValueError(
                f"loss.kind nash fits win rates, which reward.kind {self.reward.kind} does not give; use "
                "--reward.kind voter (with --reward.voter judge for any videos), or another loss"
            )

    def _check_selection(self) -> None:
        """Raise ValueError if a setting of the selection would have no effect."""
        groups = {"selection": asdict(self.selection), "subset": asdict(self.subset)}
        defaults = {"selection": asdict(SelectionConfig()), "subset": asdict(SubsetConfig())}
        changed = {
            f"{group}.{name}": defaults[group][name]
            for group, values in groups.items()
            for name, value in values.items()
            if value != defaults[group][name]
        }
        if self.loss.kind == "grpo" and changed:
            raise ValueError(
                f"loss.kind grpo trains on all samples of a clip and selects no pairs, so {', '.join(changed)} would "
                "have no effect; leave it out, or pass "
                + " ".join(f"--{name} {'null' if value is None else value}" for name, value in changed.items())
            )
        if self.reward.kind != "judge" and self.selection.repetition_fraction:
            raise ValueError(
                "selection.repetition_fraction needs the judge's quotes of repeated clauses, which reward.kind "
                f"{self.reward.kind} does not give; set it to 0, or use --reward.kind judge"
            )
        bounds = [name for name in ("floors", "max_length_ratio") if getattr(self.selection, name)]
        added = [name for name in ("repetition_fraction", "repeat_negatives") if getattr(self.selection, name)]
        if bounds and added:
            raise ValueError(
                f"selection.{bounds[0]} has no effect on the pairs that selection.{added[0]} adds; leave it out, or "
                f"set --selection.{added[0]} 0"
            )
        if self.reward.kind not in ("judge", "model") and self.selection.floors:
            raise ValueError(
                f"selection.floors needs named objectives, which reward.kind {self.reward.kind} does not give; use "
                "--reward.kind judge"
            )
        if self.reward.kind != "model" and self.selection.min_spreads:
            raise ValueError(
                "selection.min_spreads needs the spread of an ensemble of reward models, which reward.kind "
                f"{self.reward.kind} does not give; leave it out, or use --reward.kind model"
            )

    def _check_reward_model(self) -> None:
        """Raise ValueError if the reward models that the run will train lack what its settings ask of them."""
        if self.reward.kind != "model":
            return
        trains = self.reward.model is None or self.reward.refresh_clips > 0
        spreads = {"reward.caution": self.reward.caution, "selection.min_spreads": self.selection.min_spreads}
        if trains and not self.reward_training.ensemble and any(spreads.values()):
            name, value = next((name, value) for name, value in spreads.items() if value)
            raise ValueError(
                f"{name} is {value}, but the reward models of the rounds have no ensemble of heads; set "
                "--reward-training.ensemble 5"
            )
        if trains and self.selection.floors:
            raise ValueError(
                "selection.floors needs named objectives, which the reward models of the rounds do not have; pass one "
                "of kind objectives as --reward.model with --reward.refresh-clips 0, or use --reward.kind judge"
            )

    def round_fit(self, number: int) -> FitConfig:
        """Return the optimization of a round, counted from 1."""
        return replace(self.fit, learning_rate=self.fit.learning_rate * self.learning_rate_decay ** (number - 1))

    @property
    def round_loss(self) -> LossConfig:
        """Loss of the rounds; in the regularized game, the step of a round is part of the strength of the penalty.

        With eta for the start and 1 for the round's start, the next policy is start^(eta / (1 + eta)) *
        round start^(1 / (1 + eta)) * exp(eta / (1 + eta) * win rate / beta), normalized (arXiv 2505.19731).
        """
        if self.loss.kind != "nash" or self.reference_policy != "mixed":
            return self.loss
        return replace(self.loss, beta=self.loss.beta * (1 + self.eta) / self.eta)

    @property
    def teacher_loss(self) -> LossConfig:
        """Loss of rebirth's teacher: guided DPO, regardless of the loss of the rounds."""
        return replace(self.loss, kind="sigmoid", label_smoothing=0.0, per="caption")

    def server_sampler(self, processor: Processor) -> ServerSampler | None:
        """Return the sampler of the run's captions if they are sampled through a server."""
        if self.sampler.server is None:
            return None
        # Rebirth and its teacher start from the last round's model; otherwise nothing is sampled from that.
        tailors_teacher = self.rebirth is not None and self.rebirth.tailor in ("teacher", "random")
        num_adapters = self.rounds - (not self.load_sharded) + (self.rebirth is not None) + tailors_teacher
        if self.extrapolate:  # the last round's opponent has an adapter, too
            num_adapters = max(num_adapters, self.rounds)
        return ServerSampler(
            self.sampler,
            processor,
            model=self.model,
            lora=self.lora,
            max_adapters=num_adapters if self.fresh_pairs or self.rebirth or self.load_sharded else 0,
            out=self.out,
            reader=self.reader,
            overrides_frames=self.frames is not None,
        )

    @property
    def num_questions(self) -> int:
        """Number of questions in each step of the last round."""
        return round(self.qa_fraction * self.fit.batch_size)


def load_data(config: MrDpoConfig, reward: Reward, processor: Processor, *, judge: Judge) -> tuple[ClipSet, ClipSet]:
    """Load or render the training and the held-out clips; the judge judges the latter, regardless of the reward.

    Raises:
        ValueError: captions of them cannot be rated, they lack the questions or captions that the run needs, a text
            contains a special token, or they are too few for rebirth's preference clips.
    """

    def check(reference: Reference) -> None:
        judge.check(reference)
        reward.check(reference)
        check_texts(reference, processor)

    tailor = config.rebirth.tailor if config.rebirth else "none"

    def check_train(reference: Reference) -> None:
        if config.loss.ce_weight and not reference.caption.strip():
            raise ValueError(
                f"{reference.video} has no caption, which is the ground truth of guided DPO; add it, or set "
                "--loss.ce-weight 0"
            )
        if tailor != "none" and not reference.caption.strip():
            raise ValueError(
                f"{reference.video} has no caption, and rebirth.tailor {tailor} measures influence on reference "
                "captions; add it, or set --rebirth.tailor none"
            )
        if config.reward.kind != "model":
            reward.check(reference)
        check_texts(reference, processor)

    heldout_synth = heldout_config(config.synth, clips=config.heldout_clips)
    train, heldout = (
        read_clips(path, check=check_one) if path else render_clips(config.clips_dir, synth)
        for path, synth, check_one in (
            (config.references, config.synth, check_train),
            (config.heldout_references, heldout_synth, check),
        )
    )
    if not processor.family.hears:
        train, heldout = drop_sounds(train), drop_sounds(heldout)
    if config.num_questions and not any(reference.questions for reference in train.references):
        raise ValueError(
            f"qa_fraction is {config.qa_fraction}, but the references have no questions; add some, or set 0"
        )
    if config.rebirth and tailor != "none":
        split_clips(train, config.rebirth.preference_fraction, seed=config.seed)
    _log_comparisons(config, len(train.references))
    num_clips = config.kl.num_clips
    if num_clips and not any(reference.caption.strip() for reference in heldout.head(num_clips).references):
        raise ValueError(
            f"the first {num_clips} held-out references have no caption to measure the KL divergence on; add captions, "
            "or set kl.num_clips 0"
        )
    return train, heldout


def _log_comparisons(config: MrDpoConfig, num_clips: int) -> None:
    """Log how many requests a voter that is a language model takes."""
    if config.reward.voter == "llm":
        number = config.sampling.num_samples
        num_pairs = number * (number - 1) // 2 + (number**2 if config.extrapolate else 0)
        log.info(
            "reward.voter llm: up to %d requests per round, for all pairs of %d captions%s of %d clips in both orders",
            num_clips * num_pairs * 2,
            number,
            ", and of these with as many opponents (extrapolate)," if config.extrapolate else "",
            num_clips,
        )


def list_trainings(config: MrDpoConfig) -> list[tuple[LoraConfig, FitConfig]]:
    """Return adapter and optimization of everything that a run trains an adapter for."""
    trainings, reward = [(config.lora, config.fit)], config.reward_training
    if config.rebirth:
        trainings.append((config.rebirth.lora, config.rebirth.fit))
    if config.reward.kind == "model" and reward.lora:
        trainings.append((reward.lora, reward.fit))
    return trainings


def print_memory_plan(config: MrDpoConfig) -> None:
    """Print the memory that a round and rebirth would need, and the hours of a round."""
    model, frames, placement = config.model, config.frames, config.placement
    samples_here = config.sampler.server is None
    # Held-out clips are captioned here, one caption each, unless no process has the whole model.
    captions = (config.sampling.batch_size, config.sampling.num_samples if samples_here else 1)
    plan = print_adapter_plan(
        model,
        frames=frames,
        placement=placement,
        lora=config.lora,
        fit=config.fit,
        answers=config.sampling.num_samples + 1 if config.loss.kind == "grpo" else 3,
        title=config.loss.title,
        captions=None if config.load_sharded else captions,
    )
    if rebirth := config.rebirth:
        # A caption and the questions on the clip, assumed to be as long in total.
        print_adapter_plan(
            model, frames=frames, placement=placement, lora=rebirth.lora, fit=rebirth.fit, answers=2, title="rebirth"
        )
    work = make_work(
        plan,
        config.estimate,
        num_samples=config.sampling.num_samples,
        batch_size=config.sampling.batch_size,
        is_judged_by_model=config.judge.kind != "rule" and config.reward.rates_by_judge,
        is_sampled_here=samples_here,
    )
    not_estimated = []
    if config.extrapolate:
        not_estimated.append("The hours are those of the first step of a round; extrapolate adds another of this size.")
    if config.reward.voter == "llm":
        not_estimated.append("The requests of reward.voter llm are not estimated.")
    print_hours(work, config.estimate, not_estimated=not_estimated)
