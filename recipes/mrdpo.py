"""Multi-round DPO: a captioner that gets better by judging its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, judges them against the clips' events, pairs the best with the worst,
trains guided DPO on a fresh LoRA against the same weights without it, and merges: the merged model is the next round's
policy and reference. Rebirth then tunes the model from before all rounds on the captions of the model after them.
Every stage writes to `out/round_K/`; a killed run goes on with the same command.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from torch import nn

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.generate import Sampling
from salmonn.config import run_recipe
from salmonn.media.synth import SynthConfig
from salmonn.model.load import Placement, load_config
from salmonn.model.lora import LoraConfig, attach
from salmonn.model.network import Block, Network
from salmonn.model.settings import PLAIN_PROMPTS
from salmonn.prefer.pairs import choose_pairs, summarise_pairs
from salmonn.records import Caption, Pair, Reference, Score, read_json, read_records, write_json, write_records
from salmonn.score.build import make_judge
from salmonn.score.files import read_scores, write_scores
from salmonn.score.judge import Judge
from salmonn.score.protocol import sign
from salmonn.score.rates import Rates
from salmonn.score.settings import JudgeConfig
from salmonn.train.checkpoint import checkpointed, require_room
from salmonn.train.drift import DriftSet
from salmonn.train.dry_run import plan_adapter
from salmonn.train.engine import EngineName, require_engine
from salmonn.train.evaluate import (
    SIDE_BY_SIDE,
    Draw,
    clear_parts,
    draw_captions,
    encode_clips,
    evaluate,
    judge_captions,
    require_scores,
)
from salmonn.train.examples import Example, SftBatch, SftBatches, make_examples, sft_loss
from salmonn.train.guards import GuardConfig, RoundFailed, best_round, require_margin, require_pairs, worsened
from salmonn.train.log import log_rounds
from salmonn.train.loop import Batches, FitConfig, Stage, Watch, autocast, fit
from salmonn.train.preference import DpoConfig, MixedBatches, MixedLoss, PreferenceBatch, PreferenceBatches
from salmonn.train.references import ClipSet, heldout_config, read_clips, render_clips
from salmonn.train.report import Summary, plot_summary, print_table
from salmonn.train.stages import absent, kept, merge_trained, merged, num_bytes, open_run

log = logging.getLogger("mrdpo")
PARTS_NAME = "captions.parts"


@dataclass(frozen=True)
class PairConfig:
    """Choice of preference pairs.

    Args:
        num_samples: captions sampled of each training clip.
        sampling: how they are drawn.
        min_gap: least difference in Total between chosen and rejected.
        max_pairs_per_video: best with worst, second best with second worst, and so on.
        repetition_weight: what repetition counts against a caption, beside Total.
        max_length_ratio: pairs whose lengths differ by more are left out; none keeps them.
    """

    num_samples: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.95))
    min_gap: float = 0.1
    max_pairs_per_video: int = 2
    repetition_weight: float = 1.0
    max_length_ratio: float | None = None


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
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, learning_rate=1e-3, warmup=0.1))


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
        heldout_clips: number of synthetic clips to measure on.
        kl_clips: held-out clips on whose reference captions it is measured how far a model has moved; 0 leaves it out.
        rounds: of DPO.
        fresh_pairs: each round samples captions and pairs them; else all train on the first round's pairs.
        reference: policy that rewards are told against: the one that the round started from, or the run did.
        qa_share: share of the last round's examples that are questions on the training clips, to be answered.
        side_by_side: captions that are generated at once; fewer need less memory.
        judge: who scores the captions.
        pairs: sampling of captions and choice of pairs.
        dpo: the loss.
        lora: each round's fresh adapter.
        fit: each round's optimisation.
        guards: when the rounds end early.
        rebirth: the last stage; none leaves it out.
        seed: of sampling, adapters, order and dropout.
        dry_run: print what the rounds and rebirth would need of a GPU, and do nothing.
    """

    out: Path = Path("run")
    model: str = str(SHIPPED_MODEL)
    engine: EngineName = "ddp"
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = Path("run/clips")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=320, seed=11))
    heldout_clips: int = 200
    kl_clips: int = 16
    rounds: int = 3
    fresh_pairs: bool = True
    reference: Literal["renewed", "start"] = "renewed"
    qa_share: float = 0.0
    side_by_side: int = SIDE_BY_SIDE
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, learning_rate=2e-4, warmup=0.1, batch_size=16))
    guards: GuardConfig = field(default_factory=GuardConfig)
    rebirth: RebirthConfig | None = field(default_factory=RebirthConfig)
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.placement.require_trainable()
        if not 0 <= self.qa_share < 1 or (self.qa_share and not 0 < self.num_questions < self.fit.batch_size):
            raise ValueError(
                f"qa_share is the share of {self.fit.batch_size} examples a step that are questions; "
                f"{self.qa_share} leaves no question or no pair"
            )

    @property
    def num_questions(self) -> int:
        """Examples of questions in each step of the last round."""
        return round(self.qa_share * self.fit.batch_size)

    @property
    def essential(self) -> "MrDpoConfig":
        """What results follow from: a spend cap may be raised and the engine changed in a run that goes on."""
        return replace(self, engine="ddp", judge=self.judge.essential())


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        plan(config)
        return
    dist.setup()
    require_engine(config.engine)
    load_config(config.model)  # a wrong folder is told before anything is rendered
    judge = make_judge(config.judge, processes=dist.world_size())
    train, heldout = read_sets(config, judge)
    open_run(config.out, config.essential, name="mrdpo")
    captioner = load(config.model, config)
    run = encode_sets(captioner, train, heldout, judge, config)
    summary = Summary(sft=measure(captioner, run, config.out / "sft", config=config))
    play_rounds(captioner, run, summary, config=config)
    if config.rebirth and summary.best:
        be_reborn(captioner, run, config.out / "rebirth", summary=summary, config=config)
    if dist.is_main():
        write_json(config.out / "summary.json", summary.to_json())
        log_rounds(config.out, summary)
        plot_summary(summary, config.out / "summary.png")
        print_table(summary)
        log.info("written: %s and summary.png beside it", config.out / "summary.json")
    dist.barrier()


def plan(config: MrDpoConfig) -> None:
    """Print what a round and rebirth would need of memory."""
    shared = partial(plan_adapter, config.model, frames=config.frames, placement=config.placement)
    shared(lora=config.lora, fit=config.fit, answers=3, title="guided DPO", side_by_side=config.side_by_side)
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
    train_blocks: list[Block]
    heldout_blocks: list[Block]
    judge: Judge

    def train_block(self, example: Example) -> Block:
        """The block of the training clip that an example is about."""
        return self._by_path[example.video]

    @cached_property
    def _by_path(self) -> dict[Path, Block]:
        paths = (self.train.root / reference.video for reference in self.train.references)
        return dict(zip(paths, self.train_blocks, strict=True))


def read_sets(config: MrDpoConfig, judge: Judge) -> tuple[ClipSet, ClipSet]:
    """Render or read the clips to train and to measure on.

    Raises:
        ValueError: they cannot be judged, or lack the questions that are asked for; told now, not after the sampling.
    """
    synth, heldout_synth = config.synth, heldout_config(config.synth, clips=config.heldout_clips)
    train = read_clips(config.references) if config.references else render_clips(config.clips_dir, synth)
    heldout = (
        read_clips(config.heldout_references)
        if config.heldout_references
        else render_clips(config.clips_dir, heldout_synth)
    )
    for reference in (*train.references, *heldout.references):
        judge.check(reference)
    if config.num_questions and not any(reference.questions for reference in train.references):
        raise ValueError(
            f"qa_share is {config.qa_share}, but the references have no questions: add some, or set it to 0"
        )
    return train, heldout


def encode_sets(captioner: Captioner, train: ClipSet, heldout: ClipSet, judge: Judge, config: MrDpoConfig) -> Run:
    """Run the frozen towers once on all clips."""
    return Run(
        train=train,
        heldout=heldout,
        train_blocks=encode_clips(captioner, train, name="training clips", side_by_side=config.side_by_side),
        heldout_blocks=encode_clips(captioner, heldout, name="held-out clips", side_by_side=config.side_by_side),
        judge=judge,
    )


def play_rounds(captioner: Captioner, run: Run, summary: Summary, *, config: MrDpoConfig) -> None:
    """All rounds, in place: the captioner ends up as the best model, whose stage the summary names."""
    for number in range(1, config.rounds + 1):
        folder = config.out / f"round_{number}"
        try:
            play_round(captioner, run, number, folder, config=config)
        except RoundFailed as error:
            if number == 1:
                raise
            summary.stopped = str(error)
            break
        summary.rounds.append(measure(captioner, run, folder, summary=summary, config=config))
        if reason := worsened(summary, config.guards):
            summary.stopped = reason
            break
    best = best_round(summary)
    if summary.stopped:
        log.warning("the rounds end: %s", summary.stopped)
        if summary.rounds[best - 1].total >= summary.sft.total:
            log.warning("no round is better than the start, and there is nothing to be reborn from")
            return
    summary.best = f"round_{best}"
    captioner.reload(config.out / summary.best / "merged", placement=config.placement)


def play_round(captioner: Captioner, run: Run, number: int, folder: Path, *, config: MrDpoConfig) -> None:
    """One round, in place: sample, judge, pair, train, merge, save; or read what a run before has made of it.

    Raises:
        RoundFailed: its pairs are too few, or taught nothing.
    """
    if merged(folder):
        captioner.reload(folder / "merged", placement=config.placement)
        return
    seed = config.seed * 1000 + number
    if config.fresh_pairs or number == 1:
        pairs = make_pairs(captioner, run, folder, config=config, seed=seed)
    else:
        pairs = read_records(config.out / "round_1" / "pairs.jsonl", Pair)
    report_pairs(pairs, folder)
    require_pairs(pairs, config.guards, batch_size=config.fit.batch_size, name=folder.name)
    train_policy(captioner, run, pairs, folder, config=config, number=number)


def make_pairs(captioner: Captioner, run: Run, folder: Path, *, config: MrDpoConfig, seed: int) -> list[Pair]:
    """Sample, judge and pair captions of the training clips."""
    require_room(config.out, num_bytes(captioner), what=f"the model of {folder.name}")  # before hours of sampling
    captions = kept(folder / "captions.jsonl", Caption, lambda: sample_captions(captioner, run, config, folder, seed))
    clear_parts(folder / PARTS_NAME)
    references = {reference.video: reference for reference in run.train.references}
    scores = judged(folder / "scores.jsonl", captions, references, judge=run.judge)
    return kept(folder / "pairs.jsonl", Pair, lambda: pair_captions(captions, scores, references, config=config.pairs))


def judged(path: Path, captions: Sequence[Caption], references: dict[str, Reference], *, judge: Judge) -> list[Score]:
    """Scores of captions, from the score file where a run before wrote it; the unscored ones stay in it."""
    if absent(path):
        results = judge_captions(captions, references, judge=judge)
        require_scores(results, name=path.parent.name)  # before it is written: a run without any score is no result
        if dist.is_main():
            write_scores(path, sign(judge), results)
        dist.barrier()
    return read_scores(path).scores


def sample_captions(captioner: Captioner, run: Run, config: MrDpoConfig, folder: Path, seed: int) -> list[Caption]:
    """Several captions of each training clip by nucleus sampling."""
    return draw_captions(
        captioner,
        run.train.references,
        run.train_blocks,
        draw=Draw(config.pairs.sampling, seed=seed, num_samples=config.pairs.num_samples),
        name=f"{folder.name}: sampling",
        side_by_side=config.side_by_side,
        parts=folder / PARTS_NAME,
    )


def pair_captions(
    captions: Sequence[Caption], scores: Sequence[Score], references: dict[str, Reference], *, config: PairConfig
) -> list[Pair]:
    """Best against worst, clip by clip, of the captions that have a score."""
    scored = {(score.video, score.sample) for score in scores}
    by_video: dict[str, list[Caption]] = {}
    for caption in captions:
        if (caption.video, caption.sample) in scored:
            by_video.setdefault(caption.video, []).append(caption)
    return choose_pairs(
        by_video,
        scores,
        references,
        min_gap=config.min_gap,
        max_pairs_per_video=config.max_pairs_per_video,
        repetition_weight=config.repetition_weight,
        max_length_ratio=config.max_length_ratio,
    )


def report_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Log the pairs' gap and lengths."""
    report = summarise_pairs(pairs)
    log.info(
        "%s: %d pairs, mean gap %.3f; mean words %.1f chosen, %.1f rejected",
        folder.name,
        report.num_pairs,
        report.mean_gap,
        report.mean_words_chosen,
        report.mean_words_rejected,
    )


def train_policy(
    captioner: Captioner, run: Run, pairs: Sequence[Pair], folder: Path, *, config: MrDpoConfig, number: int
) -> None:
    """Guided DPO on a fresh adapter, which is saved, and merged with the weights as they are on disk."""
    base, seed = captioner.name, config.seed * 1000 + number
    with checkpointed(folder) as checkpoints:
        attach(captioner.network, config.lora, seed=seed)
        batches, loss = deal_pairs(captioner, run, pairs, config=config, number=number)
        stage = Stage(
            f"{folder.name}: guided DPO", folder, checkpoints, seed, config.engine, watch_drift(captioner, run, config)
        )
        done = fit(captioner.network, batches, loss, config.fit.resolve(len(pairs)), stage=stage)
        require_margin(folder, config.guards)
        merge_trained(captioner, folder, done, base=base, lora=config.lora, placement=config.placement, adapter=True)


def deal_pairs(
    captioner: Captioner, run: Run, pairs: Sequence[Pair], *, config: MrDpoConfig, number: int
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
        accumulation=config.fit.accumulation,
    )
    with autocast(config.fit.precision):
        batches.refer(reference_policy(captioner, config=config, number=number))
    loss = MixedLoss(config.dpo, qa_share=questions / config.fit.batch_size)
    if not questions:
        return batches, loss
    return MixedBatches(batches, ask(captioner, run, config, seed=seed, num_questions=questions)), loss


def reference_policy(captioner: Captioner, *, config: MrDpoConfig, number: int) -> Network:
    """The network that, with its adapter off, is what rewards are told against."""
    if config.reference == "renewed" or number == 1:
        return captioner.network
    start = load(config.model, config).network
    attach(start, config.lora, seed=0)  # which is off whenever it is asked
    return start


def watch_drift(captioner: Captioner, run: Run, config: MrDpoConfig) -> Watch | None:
    """How far the policy moves from the round's start, on a fixed set of held-out clips."""
    fixed = drift_set(captioner, run, config)
    if not fixed:
        return None
    network = captioner.network

    def measure(model: nn.Module) -> dict[str, float]:
        with autocast(config.fit.precision):
            return {"kl": fixed.to_reference(model, network)}

    return Watch(measure, every=config.dpo.kl_every)


def drift_set(captioner: Captioner, run: Run, config: MrDpoConfig) -> DriftSet | None:
    """The held-out clips that it is measured on how far a model has moved; none where that is left out."""
    if not config.kl_clips:
        return None
    return DriftSet(
        run.heldout.references[: config.kl_clips],
        run.heldout_blocks[: config.kl_clips],
        captioner.processor,
        prompt=captioner.describe(),
    )


def ask(captioner: Captioner, run: Run, config: MrDpoConfig, *, seed: int, num_questions: int) -> SftBatches:
    """The questions on the training clips, dealt out among the pairs of a round."""
    return SftBatches(
        make_examples(run.train.references, ("questions",), root=run.train.root),
        captioner.processor,
        run.train_block,
        batch_size=num_questions,
        seed=seed,
        accumulation=config.fit.accumulation,
        first_rank=config.fit.batch_size - num_questions,
    )


def be_reborn(captioner: Captioner, run: Run, folder: Path, *, summary: Summary, config: MrDpoConfig) -> None:
    """Tune the starting model, in place, on the improved model's captions of the training clips and on questions."""
    rebirth = config.rebirth
    assert rebirth is not None
    if merged(folder):
        captioner.reload(folder / "merged", placement=config.placement)
    else:
        captions = kept(folder / "captions.jsonl", Caption, partial(teach, captioner, run, folder, config=config))
        clear_parts(folder / PARTS_NAME)
        base = config.model if rebirth.start == "start" else captioner.name
        captioner.reload(base, placement=config.placement)
        with checkpointed(folder) as checkpoints:
            attach(captioner.network, rebirth.lora, seed=config.seed)
            batches = tell(captioner, run, captions, rebirth.fit, seed=config.seed)
            stage = Stage("rebirth", folder, checkpoints, config.seed, config.engine)
            steps = rebirth.fit.resolve(len(batches.examples))
            done = fit(captioner.network, batches, sft_loss, steps, stage=stage)
            merge_trained(
                captioner, folder, done, base=base, lora=rebirth.lora, placement=config.placement, adapter=True
            )
    summary.rebirth = measure(captioner, run, folder, summary=summary, config=config)


def tell(captioner: Captioner, run: Run, captions: Sequence[Caption], fit: FitConfig, *, seed: int) -> SftBatches:
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
        accumulation=fit.accumulation,
    )


def teach(teacher: Captioner, run: Run, folder: Path, *, config: MrDpoConfig) -> list[Caption]:
    """The teacher's most likely caption of each training clip."""
    greedy = replace(config.pairs.sampling, temperature=0.0)
    return draw_captions(
        teacher,
        run.train.references,
        run.train_blocks,
        draw=Draw(greedy, seed=config.seed),
        name="rebirth: captions",
        side_by_side=config.side_by_side,
        parts=folder / PARTS_NAME,
    )


def measure(
    captioner: Captioner, run: Run, folder: Path, *, config: MrDpoConfig, summary: Summary | None = None
) -> Rates:
    """Rates on the held-out clips, kept in `heldout/` with captions, answers and scores.

    Where there is a summary of stages before, it takes up how far the model is from the run's start.
    """
    stage, folder = folder.name, folder / "heldout"
    path = folder / "rates.json"
    if absent(path):
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
            write_records(folder / "captions.jsonl", result.captions)
            write_records(folder / "answers.jsonl", result.answers)
            write_scores(folder / "scores.jsonl", sign(run.judge, totals=[result.rates.total]), result.results)
            write_json(path, asdict(result.rates))
        dist.barrier()
    rates = Rates(**read_json(path))
    log.info("%s: total %.3f, questions %s", stage, rates.total, rates.qa_accuracy)
    fixed = drift_set(captioner, run, config)
    if summary and fixed:
        if absent(folder / "kl.json"):
            kl = fixed.between(captioner.network, load(config.model, config).network)
            if dist.is_main():
                write_json(folder / "kl.json", kl)
            dist.barrier()
        summary.kl[stage.replace("_", " ")] = read_json(folder / "kl.json")
    return rates


if __name__ == "__main__":
    run_recipe(main, MrDpoConfig, description=__doc__, on_mistake=dist.give_up)
