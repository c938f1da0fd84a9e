"""Preference examples, batches and log-probabilities of a small network."""

import torch

from salmonn.caption.processor import PromptRow
from salmonn.model.lora import LoraConfig
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.train.preference import PreferenceBatches, PreferenceExample
from salmonn.train.reference_logps import compute_reference_logps

LORA = LoraConfig(rank=4, dropout=0.0)
LOSS = make_loss(LossConfig())


def to_examples(pairs, features_by_video) -> list[PreferenceExample]:
    return [PreferenceExample(pair, features_by_video[pair.video]) for pair in pairs]


def reference_logps(captioner, examples, *, batch_size=2, **options) -> list[tuple[float, float]]:
    """Return the reference log-probabilities (chosen, rejected) of each pair."""
    logps = compute_reference_logps(
        captioner.network,
        examples,
        captioner.processor,
        roles=LOSS.reference_roles,
        batch_size=batch_size,
        **options,
    )
    return [(values["chosen"], values["rejected"]) for values in logps]


def make_batches(captioner, examples, *, reference=None, batch_size, **options) -> PreferenceBatches:
    reference = reference_logps(captioner, examples) if reference is None else reference
    logps = [dict(zip(("chosen", "rejected"), values, strict=True)) for values in reference]
    options = {"roles": LOSS.roles, "seed": 0} | options
    return PreferenceBatches(examples, logps, captioner.processor, batch_size=batch_size, **options)


def answer_logp(captioner, pair, text, features) -> float:
    """Return the log-probability of one answer in a batch of its own."""
    with torch.no_grad():
        inputs = captioner.processor.collate([PromptRow(0, pair.prompt, text)], [features])
        return captioner.network(inputs).sum().item()
