"""Guided DPO on preference pairs that are there already, in the format of the published models.

    torchrun recipes/dpo.py --preferences data/published_dpo.json --model FOLDER --out run/dpo

One round: a fresh LoRA is trained on chosen against rejected answers, with the ground truth beside them; the reference
is the same weights without it; then it is merged. Where pairs are to be made first, of the model's own captions,
`mrdpo.py` is the recipe. Killed, the same command goes on from the last checkpoint.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.config import run_recipe
from salmonn.conversations import Conversation, read_conversations
from salmonn.model.layout import ClipFeatures
from salmonn.model.loading import Placement, load_config
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.records import Comparison
from salmonn.train.checkpoint import checkpointed
from salmonn.train.data import Example, conversation_examples
from salmonn.train.dry_run import print_adapter_plan
from salmonn.train.evaluate import encode_examples
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.loop import FitConfig, FitContext, autocast, fit, require_processes
from salmonn.train.parallel import StrategyName
from salmonn.train.preference import DpoConfig, PreferenceBatches, PreferenceLoss
from salmonn.train.run_folder import is_complete, merge_trained, open_run

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class OfflineDpoConfig:
    """Guided DPO on given pairs.

    Args:
        preferences: .json or .jsonl of published conversations with preferences (docs/data.md).
        model: folder or hub id of the model to start from.
        out: folder for adapter, merged model and the log of steps.
        engine: how training is spread over processes; it may change when a run goes on.
        placement: device and type of its weights.
        frames: values of the model's frame rule that are other in training, such as `min_frames`.
        feature_cache: where the clips' tokens are kept.
        dpo: the loss.
        lora: the adapter.
        fit: optimisation.
        seed: of adapter, order and dropout.
        dry_run: print what it would need of memory, from no weights, and do nothing.
    """

    preferences: Path
    model: str
    out: Path
    strategy: StrategyName = "ddp"
    placement: Placement = field(default_factory=lambda: Placement(dtype="float32", attention="sdpa"))
    frames: dict[str, int | float] | None = None
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=128, alpha=256))
    fit: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=5e-6, batch_size=8, weight_decay=0.0))
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.placement.require_trainable()


def main(config: OfflineDpoConfig) -> None:
    """Run the round."""
    if config.dry_run:
        print_adapter_plan(
            config.model,
            frames=config.frames,
            lora=config.lora,
            placement=config.placement,
            fit=config.fit,
            answers=3,
            title="guided DPO",
        )
        return
    dist.setup()
    require_processes(config.strategy, config.fit)
    load_config(config.model)  # a wrong folder is told first
    examples, pairs = read_preferences(config)
    # What results do not follow from may change in a run that goes on.
    open_run(config.out, replace(config, strategy="ddp", feature_cache=FeatureCacheConfig()), name="dpo")
    if is_complete(config.out):
        log.info("%s is trained already", config.out)
        return
    captioner = Captioner.load(config.model, placement=config.placement, frames=config.frames)
    blocks = encode(captioner, examples, config.feature_cache)
    attach_lora(captioner.network, config.lora, seed=config.seed)
    batches = PreferenceBatches(
        pairs,
        blocks,
        captioner.processor,
        batch_size=config.fit.batch_size,
        seed=config.seed,
        gradient_accumulation_steps=config.fit.gradient_accumulation_steps,
    )
    with autocast(config.fit.precision):
        batches.compute_reference_logps(captioner.network, folder=config.out)
    with checkpointed(config.out) as checkpoints:
        done = fit(
            captioner.network,
            batches,
            PreferenceLoss(config.dpo),
            config.fit.resolve(len(pairs)),
            stage=FitContext("guided DPO", config.out, checkpoints, config.seed, config.strategy),
        )
        merge_trained(
            captioner, config.out, done, base=config.model, lora=config.lora, placement=config.placement, adapter=True
        )


def read_preferences(config: OfflineDpoConfig) -> tuple[list[Example], list[Comparison]]:
    """The clips of the preferences and their pairs, one beside the other.

    Raises:
        ValueError: there is none, or it lacks the ground truth that the loss asks for.
    """
    root = config.preferences.parent
    every = read_conversations(config.preferences)
    given = [one for one in every if one.preference]
    if left := len(every) - len(given):
        log.info("%d conversations without a preference are left to recipes/sft.py", left)
    if not given:
        raise ValueError(f"{config.preferences} holds no preference: an item needs a chosen and a rejected answer")
    pairs = [to_pair(one, name=str(number)) for number, one in enumerate(given)]
    if config.dpo.ce_weight and (bare := sum(not pair.ground_truth for pair in pairs)):
        raise ValueError(
            f"{bare} preferences of {config.preferences} have no ground truth for the cross-entropy: "
            "add it, or leave the cross-entropy out with --dpo.ce_weight 0"
        )
    return conversation_examples(given, root=root), pairs


def to_pair(conversation: Conversation, *, name: str) -> Comparison:
    """A conversation's preference as a pair about the clip of this name."""
    preference = conversation.preference
    assert preference is not None, "only preferences are paired"
    return Comparison(
        video=name,
        prompt=preference.prompt,
        chosen=preference.chosen,
        rejected=preference.rejected,
        ground_truth=preference.ground_truth,
        history=preference.history,
    )


def encode(captioner: Captioner, examples: Sequence[Example], tokens: FeatureCacheConfig) -> dict[str, ClipFeatures]:
    """The examples' clips by number, each as the frozen towers give it once."""
    blocks = encode_examples(captioner, examples, name="clips", store=open_feature_cache(tokens, captioner))
    return {str(number): blocks[example.clip] for number, example in enumerate(examples)}


if __name__ == "__main__":
    run_recipe(main, OfflineDpoConfig, description=__doc__, on_error=dist.abort)
