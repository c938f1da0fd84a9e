"""What the stages of an mrDPO run share, the trainings among them, and the evaluation of their models."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.files import read_json, write_json
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.model.network import Network
from salmonn.preference.losses import LossConfig
from salmonn.preference.rating import Reward
from salmonn.preference.reward import JudgeReward
from salmonn.preference.voter_reward import SimulatedVoterReward
from salmonn.records import Caption
from salmonn.score.judge import Judge
from salmonn.score.metrics import Rates
from salmonn.train.checkpoint import require_free_space
from salmonn.train.data import ClipSet
from salmonn.train.evaluate import (
    RATES_NAME,
    Evaluation,
    evaluate,
    evaluate_captions,
    write_evaluation,
    write_exploitability,
)
from salmonn.train.kl import make_kl_probe
from salmonn.train.loop import FitConfig
from salmonn.train.mrdpo import MrDpoConfig
from salmonn.train.reference_logps import ReferencePolicy
from salmonn.train.reward_rounds import RewardRounds
from salmonn.train.run_folder import is_missing, num_bytes
from salmonn.train.run_log import RunSummary, log_summary, print_summary, stage_name
from salmonn.train.sampling import SampleConfig, sample_captions
from salmonn.train.server_sampling import ServerSampler
from salmonn.train.sharded import load_encoding_model, load_policy

log = logging.getLogger(__name__)
ModelPath = Path | str  # folder or hub id


@dataclass(frozen=True)
class Run:
    """What all stages of a run share; `server` samples the captions of training clips, if one does."""

    config: MrDpoConfig
    train: ClipSet
    heldout: ClipSet
    judge: Judge
    reward: Reward
    server: ServerSampler | None = None

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.config.out / f"round_{number}"

    def seed(self, number: int) -> int:
        """Return the seed of a round."""
        return self.config.seed * 1000 + number

    def sample(
        self,
        model: ModelPath,
        adapters: Sequence[Path],
        clips: ClipSet,
        sampling: SampleConfig,
        *,
        name: str,
        seed: int,
        folder: Path,
        on_part: Callable[[Sequence[Caption]], object] | None = None,
    ) -> list[Caption]:
        """Sample captions of clips with a model, or load them; see `sample_captions`.

        Args:
            model: folder or hub id of the model.
            adapters: folders of the adapters that it consists of besides the run's start, for a server.
            clips, sampling, name, seed, folder, on_part: see `sample_captions`.
        """
        if self.server:
            return self.server.sample(adapters, clips, sampling, name=name, seed=seed, folder=folder, on_part=on_part)
        captioner = self.config.load_model(model)
        what = f"the model of {folder.relative_to(self.config.out).parts[0]}"
        require_free_space(self.config.out, num_bytes(captioner), what=what)  # before hours of work
        return sample_captions(captioner, clips, sampling, name=name, seed=seed, folder=folder, on_part=on_part)

    @property
    def reward_rounds(self) -> RewardRounds:
        """Labels and reward models of the rounds, for reward.kind "model"."""
        config = self.config
        load_start, judge = partial(config.load_model, config.model), self.reward
        assert isinstance(judge, JudgeReward)
        return RewardRounds(
            config.reward, config.reward_training, judge, self.train, config.out, load_start, config.seed,
            config.strategy,
        )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A training on preferences.

    Args:
        folder: folder of its results.
        seed: seed of the adapter, and of the order of the examples.
        loss: loss.
        fit: optimization.
        earlier: folders of the adapters that the policy consists of, besides the start.
        reference_policy: model that rewards are relative to; none for the policy itself.
        anchor: model that the reference policy is mixed with, if any.
        num_questions: number of questions in each step.
        steps_setting: name of the setting of the number of steps, for error messages.
        weight: factor of the update when it is merged.
    """

    folder: Path
    seed: int
    loss: LossConfig
    fit: FitConfig
    earlier: Sequence[Path]
    reference_policy: str | None = None
    anchor: str | None = None
    num_questions: int = 0
    steps_setting: str = "fit.steps"
    weight: float = 1.0

    def find_reference_policy(self, config: MrDpoConfig) -> ReferencePolicy:
        """Return the reference policy, whose networks are loaded when they are needed."""

        def loader(model: str | None) -> Callable[[], Network] | None:
            return partial(_load_with_adapter, model, config) if model else None

        return ReferencePolicy(loader(self.reference_policy), loader(self.anchor), config.eta)


def _load_with_adapter(model: str, config: MrDpoConfig) -> Network:
    network = config.load_model(model).network
    attach_lora(network, config.lora, seed=0)
    return network


def measure(model: ModelPath, folder: Path, run: Run, summary: RunSummary | None = None) -> Rates:
    """Evaluate a stage's model on the held-out clips, or load the result from `heldout/`.

    With a summary of the stages before, also measure its KL divergence from the run's start.

    Args:
        model: folder or hub id of the model.
        folder: folder of the stage.
        run: clips and judge.
        summary: gets the KL divergence.
    """
    config, results = run.config, folder / "heldout"
    kl_path = results / f"kl_{config.kl.num_clips}.json"
    needs_rates = is_missing(results / RATES_NAME)
    needs_kl = bool(summary and config.kl.num_clips) and is_missing(kl_path)
    if needs_rates or needs_kl:
        captioner = None if config.load_sharded else config.load_model(model)
        if needs_rates:
            result = _evaluate(captioner, folder, run)
            if dist.is_main():
                if isinstance(run.reward, SimulatedVoterReward):
                    write_exploitability(results, run.reward.voter, result, run.heldout)
                write_evaluation(results, result, judge=run.judge)  # last, as its rates mark the step as complete
        if needs_kl and captioner:
            start = config.load_model(config.model).network
            probe = make_kl_probe(captioner, run.heldout, config.kl, batch_size=config.fit.micro_batch_size)
            kl = probe.kl_between(captioner.network, start)
            if dist.is_main():
                write_json(kl_path, kl)
        dist.barrier()
    rates = Rates(**read_json(results / RATES_NAME))
    log.info("%s: total %.3f, questions %s", folder.name, rates.total, rates.qa_accuracy)
    if summary and config.kl.num_clips:
        summary.kl[stage_name(folder.name)] = read_json(kl_path)
    return rates


def _evaluate(captioner: Captioner | None, folder: Path, run: Run) -> Evaluation:
    """Evaluate the model of a stage on held-out clips; without a captioner by the server, without questions."""
    config, name = run.config, folder.name
    if captioner:
        return evaluate(captioner, run.heldout, judge=run.judge, sampling=config.sampling, name=name)
    assert run.server
    captions = run.server.sample(
        adapters_of_rounds(0 if name == "sft" else int(name.removeprefix("round_")), config),
        run.heldout,
        config.sampling.greedy(),
        name=f"{name}: captions of held-out clips",
        seed=config.seed,
        folder=folder / "heldout",
    )
    return evaluate_captions(captions, [], run.heldout, judge=run.judge, name=name)


def adapters_of_rounds(last: int, config: MrDpoConfig) -> list[Path]:
    """Return the folders of the adapters of the first rounds, which the merged model of the last one consists of."""
    return [config.out / f"round_{number}" / "adapter" for number in range(1, last + 1)]


def load_encoders_of(config: MrDpoConfig) -> Captioner:
    """Load the start of a run to encode clips; with `load_sharded`, its encoders only."""
    return load_encoding_model(config.model, config) if config.load_sharded else config.load_model(config.model)


def load_policy_of(model: ModelPath, lora: LoraConfig, config: MrDpoConfig, *, seed: int) -> Captioner:
    """Load a model with a fresh adapter; each process loads a part of the weights with `load_sharded`."""
    if config.load_sharded:
        captioner = load_encoding_model(model, config)
        load_policy(captioner, model, config, lora=lora, seed=seed)
        return captioner
    captioner = config.load_model(model)
    attach_lora(captioner.network, lora, seed=seed)
    return captioner


def report(run: Run, summary: RunSummary) -> None:
    """Show the stages so far in the terminal and in TensorBoard."""
    if dist.is_main():
        log_summary(run.config.out, summary)
        print_summary(summary)
