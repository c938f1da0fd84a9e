"""Baseline: a straightforward guided-DPO step, and captioning by transformers' own `generate`.

Policy and reference policy each encode the clip, then five rows go through the language model one by one (the policy's
chosen, rejected and ground truth, the reference policy's chosen and rejected), each with the whole clip and with logits
for all positions.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.layout import ClipInputs, ModelInputs
from salmonn.model.network import Network
from salmonn.records import Comparison

BETA, CE_WEIGHT = 0.1, 0.1  # defaults of DpoConfig


@dataclass(frozen=True)
class NaiveStep:
    """One step on one pair without any cached intermediate."""

    network: Network
    processor: Processor
    media: ClipInputs
    pair: Comparison

    def loss(self) -> Tensor:
        """Compute the guided-DPO loss; the autograd graph holds three rows."""
        pair = self.pair
        texts = {"chosen": pair.chosen, "rejected": pair.rejected, "truth": pair.ground_truth}
        rows = {
            name: self.processor.collate([PromptRow(0, pair.prompt, text, pair.history)], [self.media]).to(
                self.network.device
            )
            for name, text in texts.items()
        }
        features = self._encode(rows["chosen"])
        policy = {name: self._logps(row, features) for name, row in rows.items()}
        with torch.no_grad(), self.network.lm.disable_adapter():
            features = self._encode(rows["chosen"])
            reference = {name: self._logps(rows[name], features).sum() for name in ("chosen", "rejected")}
        chosen = policy["chosen"].sum() - reference["chosen"]
        rejected = policy["rejected"].sum() - reference["rejected"]
        cross_entropy = -policy["truth"].sum() / (rows["truth"].labels[:, 1:] != -100).sum()
        return -F.logsigmoid(BETA * (chosen - rejected)) + CE_WEIGHT * cross_entropy

    def _encode(self, row: ModelInputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.network.encode(row.clip_inputs, row.layouts)

    def _logps(self, row: ModelInputs, features: tuple[Tensor, ...]) -> Tensor:
        """Return the log-probability (1, L - 1) of each label, 0 elsewhere, from logits (1, L, V) of all positions."""
        row = replace(row, clip_features=features, clip_inputs=())
        logits = self.network.lm(**embeds_of(self.network, row), use_cache=False).logits[:, :-1].float()
        targets = row.labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return logps * (targets != -100)


def embeds_of(network: Network, inputs: ModelInputs) -> dict[str, Any]:
    """Build the language model's inputs for rows without padding; the causal mask suffices."""
    positions = network.family.rotary_positions(inputs.position_ids)
    return {"inputs_embeds": network.embed(inputs), "position_ids": positions}


def naive_answers(
    network: Network,
    processor: Processor,
    clip: ClipInputs,
    prompt: str,
    *,
    num_samples: int,
    generation: dict[str, Any],
) -> list[list[int]]:
    """Generate several answers to one prompt, each by a separate generate() call that encodes and prefills again."""
    answers = []
    for _ in range(num_samples):
        inputs = processor.collate([PromptRow(0, prompt)], [clip]).to(network.device)
        with torch.no_grad():
            given = embeds_of(network, inputs)
            output = network.lm.generate(**given, attention_mask=inputs.attention_mask, **generation)
        answers.append(output[0].tolist())
    return answers
