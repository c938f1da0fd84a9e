"""Multi-round DPO: a captioner that gets better by judging its own captions, then rebirth.

    torchrun recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

Each round samples captions of the training clips, judges them against the clips' events, pairs the best with the worst,
trains guided DPO on a fresh LoRA against the same weights without it, and merges: the merged model is the next round's
policy and reference. Rebirth then tunes the model from before all rounds on the captions of the model after them.
Every stage writes to `out/round_K/`; a killed run goes on with the same command.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.generate import Sampling
from salmonn.config import claim_folder, run_recipe
from salmonn.media.synth import SynthConfig
from salmonn.model.load import CONFIG_NAME, Placement, load_config
from salmonn.model.lora import LoraConfig, attach, merge, save_adapter
from salmonn.model.network import Block
from salmonn.model.settings import PLAIN_PROMPTS
from salmonn.prefer.pairs import choose_pairs, summarise_pairs
from salmonn.records import Caption, Pair, Reference, Score, read_json, read_records, write_json, write_records
from salmonn.score.build import make_judge
from salmonn.score.files import read_scores, write_scores
from salmonn.score.judge import Judge
from salmonn.score.protocol import sign
from salmonn.score.rates import Rates
from salmonn.score.settings import JudgeConfig
from salmonn.train.checkpoint import checkpointed
from salmonn.train.dry_run import plan_adapter
from salmonn.train.evaluate import SIDE_BY_SIDE, caption_clips, encode_clips, evaluate, judge_captions, require_scores
from salmonn.train.examples import Example, SftBatches, make_examples, sft_loss
from salmonn.train.loop import FitConfig, StepLog, autocast, fit
from salmonn.train.preference import DpoConfig, MixedBatches, MixedLoss, PreferenceBatches
from salmonn.train.references import ClipSet, heldout_config, read_clips, render_clips
from salmonn.train.report import Summary, plot_summary, print_table

log = logging.getLogger("mrdpo")
Record = TypeVar("Record")


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
        lora: adapter, merged at the end.
        fit: optimisation.
    """

    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, learning_rate=1e-3, warmup=0.1))


@dataclass(frozen=True)
class MrDpoConfig:
    """A run of mrDPO.

    Args:
        out: folder for all results.
        model: folder or hub id of the model to start from; the shipped toy model by default.
        placement: device and type of its weights.
        frames: values of the model's frame rule that are other in training, such as `min_frames`.
        references: JSONL of references (events, caption, questions) to one's own training videos; none renders
            synthetic clips as `synth` says.
        heldout_references: likewise for measuring.
        clips_dir: where synthetic clips are kept.
        synth: training clips. Held-out clips follow from its seed, on a seed of their own.
        heldout_clips: number of synthetic clips to measure on.
        rounds: of DPO.
        qa_share: share of the last round's examples that are questions on the training clips, to be answered.
        side_by_side: captions that are generated at once; fewer need less memory.
        judge: who scores the captions.
        pairs: sampling of captions and choice of pairs.
        dpo: the loss.
        lora: each round's fresh adapter.
        fit: each round's optimisation.
        rebirth: the last stage.
        seed: of sampling, adapters, order and dropout.
        dry_run: print what the rounds and rebirth would need of a GPU, and do nothing.
    """

    out: Path = Path("run")
    model: str = str(SHIPPED_MODEL)
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    references: Path | None = None
    heldout_references: Path | None = None
    clips_dir: Path = Path("run/clips")
    synth: SynthConfig = field(default_factory=lambda: SynthConfig(clips=320, seed=11))
    heldout_clips: int = 200
    rounds: int = 3
    qa_share: float = 0.0
    side_by_side: int = SIDE_BY_SIDE
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, learning_rate=2e-4, warmup=0.1, batch_size=16))
    rebirth: RebirthConfig = field(default_factory=RebirthConfig)
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


def main(config: MrDpoConfig) -> None:
    """Run all rounds and rebirth."""
    if config.dry_run:
        plan(config)
        return
    dist.setup()
    load_config(config.model)  # a wrong folder is told before anything is rendered
    judge = make_judge(config.judge, processes=dist.world_size())
    train, heldout = read_sets(config, judge)
    if dist.is_main():
        # A spend cap may be raised, and a server be asked faster, in a run that goes on.
        claim_folder(config.out, replace(config, judge=config.judge.essential()), name="mrdpo")
    captioner = load(config.model, config)
    run = encode_sets(captioner, train, heldout, judge, config)
    summary = Summary(sft=measure(captioner, run, config.out / "sft", config=config))
    for number in range(1, config.rounds + 1):
        folder = config.out / f"round_{number}"
        if absent(folder / "merged" / CONFIG_NAME):
            play_round(captioner, run, number, folder, config=config)
        else:
            del captioner  # before the next is loaded: a GPU holds one
            captioner = load(folder / "merged", config)
        summary.rounds.append(measure(captioner, run, folder, config=config))
    folder = config.out / "rebirth"
    if absent(folder / "merged" / CONFIG_NAME):
        captions = kept(folder / "captions.jsonl", Caption, partial(teach, captioner, run, config=config))
        del captioner
        captioner = load(config.model, config)
        be_reborn(captioner, run, captions, folder, config=config)
    else:
        del captioner
        captioner = load(folder / "merged", config)
    summary.rebirth = measure(captioner, run, folder, config=config)
    if dist.is_main():
        write_json(config.out / "summary.json", summary.to_json())
        plot_summary(summary, config.out / "summary.png")
        print_table(summary)
        log.info("written: %s and summary.png beside it", config.out / "summary.json")
    dist.barrier()


def plan(config: MrDpoConfig) -> None:
    """Print what a round and rebirth would need of memory."""
    shared = partial(plan_adapter, config.model, frames=config.frames, placement=config.placement)
    shared(lora=config.lora, fit=config.fit, answers=3, title="guided DPO", side_by_side=config.side_by_side)
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


def play_round(captioner: Captioner, run: Run, number: int, folder: Path, *, config: MrDpoConfig) -> None:
    """One round, in place: sample, judge, pair, train, merge, save."""
    seed = config.seed * 1000 + number
    captions = kept(folder / "captions.jsonl", Caption, lambda: sample_captions(captioner, run, config, folder, seed))
    references = {reference.video: reference for reference in run.train.references}
    scores = judged(folder / "scores.jsonl", captions, references, judge=run.judge)
    pairs = kept(folder / "pairs.jsonl", Pair, lambda: pair_captions(captions, scores, references, config=config.pairs))
    report_pairs(pairs, folder)
    num_questions = config.num_questions if number == config.rounds else 0
    train_policy(captioner, run, pairs, folder, config=config, seed=seed, num_questions=num_questions)


def kept(path: Path, record_type: type[Record], make: Callable[[], Sequence[Record]]) -> list[Record]:
    """Records of a stage: read where a run before made them, else made and written."""
    if absent(path):
        records = make()
        if dist.is_main():
            write_records(path, records)
        dist.barrier()
    return read_records(path, record_type)


def judged(path: Path, captions: Sequence[Caption], references: dict[str, Reference], *, judge: Judge) -> list[Score]:
    """Scores of captions, from the score file where a run before wrote it; the unscored ones stay in it."""
    if absent(path):
        results = judge_captions(captions, references, judge=judge)
        require_scores(results, name=path.parent.name)  # before it is written: a run without any score is no result
        if dist.is_main():
            write_scores(path, sign(judge), results)
        dist.barrier()
    return read_scores(path).scores


def absent(path: Path) -> bool:
    """Whether a file is still to be made. All ranks look before one of them writes, so that all take the same way."""
    answer = not path.is_file()
    dist.barrier()
    return answer


def sample_captions(captioner: Captioner, run: Run, config: MrDpoConfig, folder: Path, seed: int) -> list[Caption]:
    """Several captions of each training clip by nucleus sampling."""
    return caption_clips(
        captioner,
        run.train.references,
        run.train_blocks,
        sampling=config.pairs.sampling,
        seed=seed,
        num_samples=config.pairs.num_samples,
        name=f"{folder.name}: sampling",
        side_by_side=config.side_by_side,
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
    """Log the pairs' gap and lengths; no pairs end the run with words."""
    report = summarise_pairs(pairs)
    if not pairs:
        raise ValueError(
            f"{folder.name} found no pair of captions that differ enough: sample more captions (pairs.num_samples), "
            "at a higher temperature, or ask for a smaller gap (pairs.min_gap)"
        )
    log.info(
        "%s: %d pairs, mean gap %.3f; mean words %.1f chosen, %.1f rejected",
        folder.name,
        report.num_pairs,
        report.mean_gap,
        report.mean_words_chosen,
        report.mean_words_rejected,
    )


def train_policy(
    captioner: Captioner,
    run: Run,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    config: MrDpoConfig,
    seed: int,
    num_questions: int,
) -> None:
    """Guided DPO on a fresh adapter, which is saved and merged."""
    attach(captioner.network, config.lora, seed=seed)
    blocks = {ref.video: block for ref, block in zip(run.train.references, run.train_blocks, strict=True)}
    batches = PreferenceBatches(
        pairs,
        blocks,
        captioner.processor,
        batch_size=config.fit.batch_size - num_questions,
        seed=seed,
        accumulation=config.fit.accumulation,
    )
    with autocast(config.fit.precision):
        batches.refer(captioner.network)
    asked = ask(captioner, run, config, seed=seed, num_questions=num_questions) if num_questions else None
    with checkpointed(folder) as checkpoint:
        fit(
            captioner.network,
            MixedBatches(batches, asked) if asked else batches,
            MixedLoss(config.dpo, qa_share=num_questions / config.fit.batch_size),
            config.fit.resolve(len(pairs)),
            seed=seed,
            name=f"{folder.name}: guided DPO",
            checkpoint_path=checkpoint,
            on_step=StepLog(folder / "steps.jsonl"),
        )
        if dist.is_main():
            save_adapter(captioner.network, folder / "adapter")
        merge(captioner.network)
        save_merged(captioner, folder)


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


def be_reborn(
    captioner: Captioner, run: Run, captions: Sequence[Caption], folder: Path, *, config: MrDpoConfig
) -> None:
    """Tune the starting model, in place, on the improved model's captions of the training clips and on questions."""
    taught = [
        replace(reference, caption=caption.text)
        for reference, caption in zip(run.train.references, captions, strict=True)
    ]
    attach(captioner.network, config.rebirth.lora, seed=config.seed)
    examples = make_examples(
        taught,
        ("caption", "questions"),
        root=run.train.root,
        prompts=captioner.processor.config.prompts or PLAIN_PROMPTS,
    )
    batches = SftBatches(
        examples,
        captioner.processor,
        run.train_block,
        batch_size=config.rebirth.fit.batch_size,
        seed=config.seed,
        accumulation=config.rebirth.fit.accumulation,
    )
    with checkpointed(folder) as checkpoint:
        fit(
            captioner.network,
            batches,
            sft_loss,
            config.rebirth.fit.resolve(len(examples)),
            seed=config.seed,
            name="rebirth",
            checkpoint_path=checkpoint,
            on_step=StepLog(folder / "steps.jsonl"),
        )
        merge(captioner.network)
        save_merged(captioner, folder)


def teach(teacher: Captioner, run: Run, *, config: MrDpoConfig) -> list[Caption]:
    """The teacher's most likely caption of each training clip."""
    greedy = replace(config.pairs.sampling, temperature=0.0)
    return caption_clips(
        teacher,
        run.train.references,
        run.train_blocks,
        sampling=greedy,
        seed=config.seed,
        name="rebirth: captions",
        side_by_side=config.side_by_side,
    )


def save_merged(captioner: Captioner, folder: Path) -> None:
    """Write the model with its adapter merged, which goes by its folder from now on."""
    captioner.name = str(folder / "merged")
    if dist.is_main():
        captioner.save(captioner.name)
    dist.barrier()


def measure(captioner: Captioner, run: Run, folder: Path, *, config: MrDpoConfig) -> Rates:
    """Rates on the held-out clips, kept in `heldout/` with captions, answers and scores."""
    folder = folder / "heldout"
    path = folder / "rates.json"
    if absent(path):
        result = evaluate(
            captioner,
            run.heldout.references,
            run.heldout_blocks,
            judge=run.judge,
            sampling=replace(config.pairs.sampling, temperature=0.0),
            name=folder.parent.name,
            side_by_side=config.side_by_side,
        )
        if dist.is_main():
            write_records(folder / "captions.jsonl", result.captions)
            write_records(folder / "answers.jsonl", result.answers)
            write_scores(folder / "scores.jsonl", sign(run.judge, totals=[result.rates.total]), result.results)
            write_json(path, asdict(result.rates))
        dist.barrier()
    rates = Rates(**read_json(path))
    log.info("%s: total %.3f, questions %s", folder.parent.name, rates.total, rates.qa_accuracy)
    return rates


if __name__ == "__main__":
    run_recipe(main, MrDpoConfig, description=__doc__)
