"""Multi-round DPO: a captioner that gets better by judging its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, judges them against the clips' events, pairs the best with the worst,
trains guided DPO on a fresh LoRA against the same weights without it, and merges: the merged model is the next round's
policy and reference. Rebirth then tunes the model from before all rounds on the captions of the model after them.
Every stage writes to `out/round_K/`; a killed run goes on with the same command.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from torch import nn

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.config import run_recipe
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.layout import ClipFeatures
from salmonn.model.loading import Placement, load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.preference.reward import make_judge
from salmonn.records import Caption, Comparison, read_json, read_records, write_json
from salmonn.score.config import JudgeConfig
from salmonn.score.judge import Judge
from salmonn.score.metrics import Rates
from salmonn.synthetic.render import SynthConfig
from salmonn.train.checkpoint import Checkpoint, Checkpoints, checkpointed, require_free_space
from salmonn.train.data import Example, SftBatch, SftBatches, make_examples, sft_loss
from salmonn.train.dry_run import print_adapter_plan
from salmonn.train.evaluate import (
    RATES_NAME,
    SIDE_BY_SIDE,
    SampleConfig,
    encode_clips,
    evaluate,
    sample_captions,
    write_evaluation,
)
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.guards import (
    EarlyStopConfig,
    RoundFailedError,
    best_round,
    require_margin,
    require_pairs,
    stop_reason,
)
from salmonn.train.kl import KLProbe
from salmonn.train.log import log_rounds
from salmonn.train.loop import Batches, Callback, FitConfig, FitContext, autocast, fit, require_processes
from salmonn.train.parallel import StrategyName
from salmonn.train.plots import plot_summary
from salmonn.train.preference import DpoConfig, MixedBatches, MixedLoss, PreferenceBatch, PreferenceBatches
from salmonn.train.references import ClipSet, heldout_config, load_clips
from salmonn.train.rounds import PairConfig, make_pairs
from salmonn.train.run_folder import (
    is_complete,
    is_missing,
    load_or_create_captions,
    merge_trained,
    num_bytes,
    open_run,
)
from salmonn.train.run_log import RunSummary, print_table

log = logging.getLogger("mrdpo")


@dataclass(frozen=True)
class RebirthConfig:
    """The final tuning of the starting model on the improved model's captions, with questions.

    Args:
        start: the model that is tuned: the run's start, or the best of the rounds, which goes on from where it is.
        lora: adapter, merged at the end.
        fit: optimisation.
    """

    start: Literal["start", "best"] = "start"
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, learning_rate=1e-3, warmup_ratio=0.1))


@dataclass(frozen=True)
class MrDpoConfig:
    """A run of mrDPO.

    Args:
        out: folder for all results.
        model: folder or hub id of the model to start from; the shipped toy model by default.
        engine: how training is spread over processes; it may change when a run goes on.
        placement: device and type of its weights.
        frames: values of the model's frame rule that are other in training, such as `min_frames`.
        references: JSONL of references (events, caption, questions) to one's own training videos; none renders
            synthetic clips as `synth` says.
        heldout_references: likewise for measuring.
        clips_dir: where synthetic clips are kept.
        synth: training clips. Held-out clips follow from its seed, on a seed of their own.
        feature_cache: where the clips' tokens are kept.
        heldout_clips: number of synthetic clips to measure on.
        kl_clips: held-out clips on whose reference captions it is measured how far a model has moved; 0 leaves it out.
        rounds: of DPO.
        fresh_pairs: each round samples captions and pairs them; else all train on the first round's pairs.
        reference_policy: policy that rewards are told against: the one that the round started from, or the run did.
        qa_fraction: share of the last round's examples that are questions on the training clips, to be answered.
        side_by_side: captions that are generated at once; fewer need less memory.
        judge: who scores the captions.
        pairs: sampling of captions and choice of pairs.
        dpo: the loss.
        lora: each round's fresh adapter.
        fit: each round's optimisation.
        early_stopping: when the rounds end early.
        rebirth: the last stage; none leaves it out.
        seed: of sampling, adapters, order and dropout.
        dry_run: print what the rounds and rebirth would need of a GPU, and do nothing.
    """

    out: Path = Path("run")
    model: str = str(SHIPPED_MODEL)
    strategy: StrategyName = "ddp"
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = Path("run/clips")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=320, seed=11))
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    heldout_clips: int = 200
    kl_clips: int = 16
    rounds: int = 3
    fresh_pairs: bool = True
    reference_policy: Literal["round_start", "run_start"] = "round_start"
    qa_fraction: float = 0.0
    side_by_side: int = SIDE_BY_SIDE
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=60, learning_rate=2e-4, warmup_ratio=0.1, batch_size=16)
    )
    early_stopping: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    rebirth: RebirthConfig | None = field(default_factory=RebirthConfig)
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.placement.require_trainable()
        if self.rounds < 1:
            raise ValueError(f"rounds counts rounds of DPO and must be at least 1, got {self.rounds}")
        if not 0 <= self.qa_fraction < 1 or (self.qa_fraction and not 0 < self.num_questions < self.fit.batch_size):
            raise ValueError(
                f"qa_fraction is the share of {self.fit.batch_size} examples a step that are questions; "
                f"{self.qa_fraction} leaves no question or no pair"
            )

    @property
    def num_questions(self) -> int:
        """Examples of questions in each step of the last round."""
        return round(self.qa_fraction * self.fit.batch_size)

    @property
    def resume_key(self) -> "MrDpoConfig":
        """What results follow from; the rest, by its default here, may be changed in a run that goes on."""
        known = replace(self, strategy="ddp", kl_clips=MrDpoConfig.kl_clips, feature_cache=FeatureCacheConfig())
        dpo = replace(self.dpo, kl_every=DpoConfig.kl_every)
        return replace(known, judge=self.judge.resume_key, dpo=dpo)


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        print_memory_plan(config)
        return
    dist.setup()
    require_processes(config.strategy, *([config.fit, config.rebirth.fit] if config.rebirth else [config.fit]))
    load_config(config.model)  # a wrong folder is told before anything is rendered
    judge = make_judge(config.judge, processes=dist.world_size())
    train, heldout = load_data(config, judge)
    open_run(config.out, config.resume_key, name="mrdpo")
    captioner = load(config.model, config)
    run = cache_features(captioner, train, heldout, judge, config)
    summary = RunSummary(sft=measure(captioner, run, config.out / "sft", config=config))
    run_rounds(captioner, run, summary, config=config)
    if config.rebirth and summary.best:
        run_rebirth(captioner, run, config.out / "rebirth", summary=summary, config=config)
    if dist.is_main():
        write_json(config.out / "summary.json", summary.to_json())
        plot_summary(summary, config.out / "summary.png")
        log.info("written: %s and summary.png beside it", config.out / "summary.json")
    dist.barrier()


def print_memory_plan(config: MrDpoConfig) -> None:
    """Print what a round and rebirth would need of memory."""
    shared = partial(print_adapter_plan, config.model, frames=config.frames, placement=config.placement)
    shared(lora=config.lora, fit=config.fit, answers=3, title="guided DPO", batch_size=config.side_by_side)
    if config.rebirth:
        # A caption, and the questions on the clip, which are taken to be as long together.
        shared(lora=config.rebirth.lora, fit=config.rebirth.fit, answers=2, title="rebirth")


def load(model: Path | str, config: MrDpoConfig) -> Captioner:
    """A model of the run, with the run's frames."""
    return Captioner.load(model, placement=config.placement, frames=config.frames)


@dataclass(frozen=True)
class Run:
    """What all stages share: clips and their tokens, which the frozen towers make once, and the judge."""

    train: ClipSet
    heldout: ClipSet
    train_blocks: list[ClipFeatures]
    heldout_blocks: list[ClipFeatures]
    judge: Judge

    def train_block(self, example: Example) -> ClipFeatures:
        """The block of the training clip that an example is about."""
        return self._by_path[example.video]

    def kl_probe(self, captioner: Captioner, config: MrDpoConfig) -> KLProbe:
        """Held-out clips that it is measured on how far a model has moved, as many at once as in training."""
        return KLProbe(
            self.heldout.references[: config.kl_clips],
            self.heldout_blocks[: config.kl_clips],
            captioner.processor,
            prompt=captioner.default_prompt(),
            batch_size=max(1, config.fit.batch_size // (dist.world_size() * config.fit.gradient_accumulation_steps)),
        )

    @cached_property
    def _by_path(self) -> dict[Path, ClipFeatures]:
        paths = (self.train.root / reference.video for reference in self.train.references)
        return dict(zip(paths, self.train_blocks, strict=True))


def load_data(config: MrDpoConfig, judge: Judge) -> tuple[ClipSet, ClipSet]:
    """Render or read the clips to train and to measure on.

    Raises:
        ValueError: they cannot be judged, or lack the questions that are asked for; told now, not after the sampling.
    """
    synth, heldout_synth = config.synth, heldout_config(config.synth, clips=config.heldout_clips)
    train = load_clips(config.references, clips_dir=config.clips_dir, synth=synth)
    heldout = load_clips(config.heldout_references, clips_dir=config.clips_dir, synth=heldout_synth)
    for reference in (*train.references, *heldout.references):
        judge.check(reference)
    if config.num_questions and not any(reference.questions for reference in train.references):
        raise ValueError(
            f"qa_fraction is {config.qa_fraction}, but the references have no questions: add some, or set it to 0"
        )
    if config.kl_clips and not any(reference.caption for reference in heldout.references[: config.kl_clips]):
        raise ValueError(
            f"the first {config.kl_clips} held-out references have no caption to measure on how far a model moves: add "
            "captions, or leave that out (kl_clips 0)"
        )
    return train, heldout


def cache_features(captioner: Captioner, train: ClipSet, heldout: ClipSet, judge: Judge, config: MrDpoConfig) -> Run:
    """Run the frozen towers once on all clips that no run before has had."""
    # Both sets at once: the tokens of one must not make room for the other's.
    train_blocks, heldout_blocks = encode_clips(
        captioner, train, heldout, name="clips", store=open_feature_cache(config.feature_cache, captioner)
    )
    return Run(train, heldout, train_blocks, heldout_blocks, judge)


def run_rounds(captioner: Captioner, run: Run, summary: RunSummary, *, config: MrDpoConfig) -> None:
    """All rounds, in place: the captioner ends up as the best model, whose stage the summary names."""
    for number in range(1, config.rounds + 1):
        folder = config.out / f"round_{number}"
        try:
            run_round(captioner, run, number, folder, config=config)
        except RoundFailedError as error:
            if number == 1:
                raise
            summary.stopped = str(error)
            break
        summary.rounds.append(measure(captioner, run, folder, summary=summary, config=config))
        report_rounds(config.out, summary)
        if reason := stop_reason(summary, config.early_stopping):
            summary.stopped = reason
            break
    if summary.stopped:
        log.warning("the rounds end: %s", summary.stopped)
    best = best_round(summary)
    if best is None:
        log.warning("no round is better than the start, and there is nothing to be reborn from")
        return
    summary.best = f"round_{best}"
    captioner.reload(config.out / summary.best / "merged", placement=config.placement)


def report_rounds(out: Path, summary: RunSummary) -> None:
    """Show the stages so far, on the terminal and to TensorBoard."""
    if dist.is_main():
        log_rounds(out, summary)
        print_table(summary)


def run_round(captioner: Captioner, run: Run, number: int, folder: Path, *, config: MrDpoConfig) -> None:
    """One round, in place: sample, judge, pair, train, merge, save; or read what a run before has made of it.

    Raises:
        RoundFailedError: its pairs are too few, or taught nothing.
    """
    if is_complete(folder):
        captioner.reload(folder / "merged", placement=config.placement)
        return
    if config.fresh_pairs or number == 1:
        require_free_space(
            config.out, num_bytes(captioner), what=f"the model of {folder.name}"
        )  # before hours of sampling
        pairs = make_pairs(
            captioner,
            run.train.references,
            run.train_blocks,
            judge=run.judge,
            config=config.pairs,
            folder=folder,
            seed=config.seed * 1000 + number,
            side_by_side=config.side_by_side,
        )
    else:
        pairs = read_records(config.out / "round_1" / "pairs.jsonl", Comparison)
    require_pairs(pairs, config.early_stopping, batch_size=config.fit.batch_size, name=folder.name)
    train_policy(captioner, run, pairs, folder, config=config, number=number)


def train_policy(
    captioner: Captioner, run: Run, pairs: Sequence[Comparison], folder: Path, *, config: MrDpoConfig, number: int
) -> None:
    """Guided DPO on a fresh adapter, which is saved, and merged with the weights as they are on disk."""
    base = captioner.name
    with checkpointed(folder) as checkpoints:
        done = fit_adapter(captioner, run, pairs, checkpoints, config=config, number=number)
        require_margin(folder, config.early_stopping)
        merge_trained(captioner, folder, done, base=base, lora=config.lora, placement=config.placement, adapter=True)


def fit_adapter(
    captioner: Captioner,
    run: Run,
    pairs: Sequence[Comparison],
    checkpoints: Checkpoints,
    *,
    config: MrDpoConfig,
    number: int,
) -> Checkpoint:
    """Train a fresh adapter; the network is used up, and nothing holds it any more when the next is read."""
    seed = config.seed * 1000 + number
    attach_lora(captioner.network, config.lora, seed=seed)
    batches, loss = preference_batches(captioner, run, pairs, config=config, number=number)
    folder = checkpoints.folder.parent
    watch = kl_callback(captioner, run, config)
    stage = FitContext(f"{folder.name}: guided DPO", folder, checkpoints, seed, config.strategy, watch)
    return fit(captioner.network, batches, loss, config.fit.resolve(len(pairs)), stage=stage)


def preference_batches(
    captioner: Captioner, run: Run, pairs: Sequence[Comparison], *, config: MrDpoConfig, number: int
) -> tuple[Batches[PreferenceBatch | SftBatch], MixedLoss]:
    """A round's batches and loss: pairs, and in the last round questions among them."""
    seed, questions = config.seed * 1000 + number, config.num_questions if number == config.rounds else 0
    blocks = {ref.video: block for ref, block in zip(run.train.references, run.train_blocks, strict=True)}
    batches = PreferenceBatches(
        pairs,
        blocks,
        captioner.processor,
        batch_size=config.fit.batch_size - questions,
        seed=seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
    )
    with autocast(config.fit.precision):
        reference = load_reference_policy(captioner, config=config, number=number)
        batches.compute_reference_logps(reference, folder=config.out / f"round_{number}")
    loss = MixedLoss(config.dpo, qa_fraction=questions / config.fit.batch_size)
    if not questions:
        return batches, loss
    return MixedBatches(batches, qa_batches(captioner, run, config, seed=seed, num_questions=questions)), loss


def load_reference_policy(captioner: Captioner, *, config: MrDpoConfig, number: int) -> Network:
    """The network that, with its adapter off, is what rewards are told against."""
    if config.reference_policy == "round_start" or number == 1:
        return captioner.network
    start = load(config.model, config).network
    attach_lora(start, config.lora, seed=0)  # which is off whenever it is asked
    return start


def kl_callback(captioner: Captioner, run: Run, config: MrDpoConfig) -> Callback | None:
    """How far the policy moves from the round's start, on a fixed set of held-out clips."""
    if not config.kl_clips:
        return None
    fixed, network = run.kl_probe(captioner, config), captioner.network

    def measure(model: nn.Module) -> dict[str, float]:
        with autocast(config.fit.precision):
            return {"kl": fixed.kl_from_reference_policy(model, network)}

    return Callback(measure, every=config.dpo.kl_every)


def qa_batches(captioner: Captioner, run: Run, config: MrDpoConfig, *, seed: int, num_questions: int) -> SftBatches:
    """The questions on the training clips, dealt out among the pairs of a round."""
    return SftBatches(
        make_examples(run.train.references, ("questions",), root=run.train.root),
        captioner.processor,
        run.train_block,
        batch_size=num_questions,
        seed=seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
        first_rank=config.fit.batch_size - num_questions,
    )


def run_rebirth(captioner: Captioner, run: Run, folder: Path, *, summary: RunSummary, config: MrDpoConfig) -> None:
    """Tune the starting model, in place, on the improved model's captions of the training clips and on questions."""
    rebirth = config.rebirth
    assert rebirth is not None
    if is_complete(folder):
        captioner.reload(folder / "merged", placement=config.placement)
    else:
        captions = load_or_create_captions(folder, partial(teacher_captions, captioner, run, config=config))
        base = config.model if rebirth.start == "start" else captioner.name
        captioner.reload(base, placement=config.placement)
        with checkpointed(folder) as checkpoints:
            attach_lora(captioner.network, rebirth.lora, seed=config.seed)
            batches = rebirth_batches(captioner, run, captions, rebirth.fit, seed=config.seed)
            stage = FitContext("rebirth", folder, checkpoints, config.seed, config.strategy)
            steps = rebirth.fit.resolve(len(batches.examples))
            done = fit(captioner.network, batches, sft_loss, steps, stage=stage)
            merge_trained(
                captioner, folder, done, base=base, lora=rebirth.lora, placement=config.placement, adapter=True
            )
    summary.rebirth = measure(captioner, run, folder, summary=summary, config=config)
    report_rounds(config.out, summary)


def rebirth_batches(
    captioner: Captioner, run: Run, captions: Sequence[Caption], fit: FitConfig, *, seed: int
) -> SftBatches:
    """The teacher's captions of the training clips and the questions on them, to be learnt."""
    taught = [
        replace(reference, caption=caption.text)
        for reference, caption in zip(run.train.references, captions, strict=True)
    ]
    examples = make_examples(
        taught,
        ("caption", "questions"),
        root=run.train.root,
        prompts=captioner.processor.config.prompts or PLAIN_PROMPTS,
    )
    return SftBatches(
        examples,
        captioner.processor,
        run.train_block,
        batch_size=fit.batch_size,
        seed=seed,
        gradient_accumulation_steps=fit.gradient_accumulation_steps,
    )


def teacher_captions(teacher: Captioner, run: Run, *, config: MrDpoConfig, parts: Path) -> list[Caption]:
    """The teacher's most likely caption of each training clip."""
    return sample_captions(
        teacher,
        run.train.references,
        run.train_blocks,
        draw=SampleConfig(replace(config.pairs.sampling, temperature=0.0), seed=config.seed),
        name="rebirth: captions",
        side_by_side=config.side_by_side,
        parts=parts,
    )


def measure(
    captioner: Captioner, run: Run, folder: Path, *, config: MrDpoConfig, summary: RunSummary | None = None
) -> Rates:
    """Rates on the held-out clips, kept in `heldout/` with captions, answers and scores.

    Where there is a summary of stages before, it takes up how far the model is from the run's start.
    """
    stage, folder = folder.name, folder / "heldout"
    path = folder / RATES_NAME
    if is_missing(path):
        result = evaluate(
            captioner,
            run.heldout.references,
            run.heldout_blocks,
            judge=run.judge,
            sampling=replace(config.pairs.sampling, temperature=0.0),
            name=stage,
            side_by_side=config.side_by_side,
        )
        if dist.is_main():
            write_evaluation(folder, result, judge=run.judge)
        dist.barrier()
    rates = Rates(**read_json(path))
    log.info("%s: total %.3f, questions %s", stage, rates.total, rates.qa_accuracy)
    if summary and config.kl_clips:
        path = folder / f"kl_{config.kl_clips}.json"
        if is_missing(path):
            start = load(config.model, config).network
            kl = run.kl_probe(captioner, config).kl_between(captioner.network, start)
            if dist.is_main():
                write_json(path, kl)
            dist.barrier()
        summary.kl[stage.replace("_", " ")] = read_json(path)
    return rates


if __name__ == "__main__":
    run_recipe(main, MrDpoConfig, description=__doc__, on_error=dist.abort)
