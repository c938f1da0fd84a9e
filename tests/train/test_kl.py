"""KL divergence from a reference policy: by hand, from a network's logits, over ranks, and without side effects."""

import math
from dataclasses import replace

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, merge_adapter
from salmonn.records import Reference
from salmonn.train.encoding import cache_features
from salmonn.train.kl import KLProbe, token_kl


@pytest.fixture(scope="module")
def encoded(random_model, clips):
    """The five clips with their features."""
    from salmonn.caption.captioner import Captioner

    return cache_features(Captioner.load(random_model), clips, name="clips")[0]


@pytest.fixture
def probe(captioner, encoded):
    """A probe on the captions of the five clips, in batches of two."""
    return KLProbe(encoded, captioner.processor, prompt=captioner.default_prompt(), batch_size=2)


@pytest.fixture
def adapted(captioner, fill_adapter):
    """The random model with a non-zero adapter and dropout."""
    attach_lora(captioner.network, LoraConfig(rank=4, alpha=8, dropout=0.5), seed=0)
    fill_adapter(captioner.network)
    captioner.network.eval()  # a fresh adapter's dropout is on
    return captioner


def test_by_hand():
    first = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).log()
    second = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]).log()
    # 0.5 log 2 + 0.25 log 0.5 + 0 = 0.25 log 2; the same: 0;
    # 0.2 log 0.5 + 0.3 log 0.75 + 0.5 log 2.5 = -0.1386294 - 0.0863046 + 0.4581454 = 0.2332113
    assert token_kl(first, second).tolist() == pytest.approx([0.25 * math.log(2), 0.0, 0.2332113], abs=1e-6)
    # Reversed: 0.25 log 0.5 + 0.5 log 2 = 0.25 log 2; 0;
    # 0.4 log 2 + 0.4 log 4/3 + 0.2 log 0.4 = 0.2772589 + 0.1150728 - 0.1832581 = 0.2090736
    assert token_kl(second, first).tolist() == pytest.approx([0.25 * math.log(2), 0.0, 0.2090736], abs=1e-6)


def test_a_probability_of_zero_has_no_weight():
    sure, unsure = torch.tensor([[0.0, -300.0]]), torch.tensor([[-0.5, -0.9327521]])
    # p = (1, e^-300 = 0 in float32): 0 - (-0.5) = 0.5, and nothing from the second token.
    assert token_kl(sure, unsure).item() == pytest.approx(0.5)


@torch.no_grad()
def test_distributions_are_the_softmax_at_each_label(captioner, media):
    network = captioner.network
    rows = [
        PromptRow(0, "Tell.", "A red circle appears."),
        PromptRow(1, "Which?", "two"),
        PromptRow(0, "What?", "beeps, then noise"),
    ]
    inputs = captioner.processor.collate(rows, media[:2])
    distributions = network(inputs, distributions=True)
    logits = network.lm(
        inputs_embeds=network.embed(inputs),
        attention_mask=inputs.attention_mask,
        position_ids=network.family.rotary_positions(inputs.position_ids),
    ).logits
    positions = [(row, index) for row, index in inputs.labels.ne(-100).nonzero().tolist()]
    expected = torch.stack([logits[row, index - 1].log_softmax(-1) for row, index in positions])
    assert torch.allclose(distributions, expected, atol=2e-3)  # the random model's logits go up to 30
    # `forward` returns their values at the labels.
    label_logps = torch.stack([distributions[n, inputs.labels[row, index]] for n, (row, index) in enumerate(positions)])
    assert torch.allclose(network(inputs)[inputs.labels[:, 1:] != -100], label_logps, atol=1e-6)


@torch.no_grad()
def expected_kl(captioner, clips, *, reversed_roles=False) -> float:
    """Compute the divergence token by token in double precision, from the decoder's logits."""
    network, nats = captioner.network, []
    for reference in clips.references:
        features = clips.features_of(reference)
        inputs = captioner.processor.collate([PromptRow(0, captioner.default_prompt(), reference.caption)], [features])

        def logits(inputs=inputs):
            return network.lm(
                inputs_embeds=network.embed(inputs),
                attention_mask=inputs.attention_mask,
                position_ids=network.family.rotary_positions(inputs.position_ids),
            ).logits[0]

        with_adapter = logits()
        with network.lm.disable_adapter():
            without_adapter = logits()
        for index in inputs.labels[0].ne(-100).nonzero().flatten().tolist():
            p, q = (
                values[index - 1].double().softmax(-1)
                for values in ((without_adapter, with_adapter) if reversed_roles else (with_adapter, without_adapter))
            )
            nats.append((p * (p / q).log()).sum().item())
    return sum(nats) / len(nats)


def test_a_network_with_and_without_its_adapter(adapted, probe, encoded):
    expected = expected_kl(adapted, encoded)
    assert expected > 0.01
    assert probe.kl_from_reference_policy(adapted.network, adapted.network) == pytest.approx(expected, rel=1e-4)
    # It is not symmetric: with reversed roles, it differs by more than ten times the tolerance above.
    assert abs(expected_kl(adapted, encoded, reversed_roles=True) / expected - 1) > 1e-3


def test_two_networks(adapted, probe, random_model):
    network, start = adapted.network, load_network(random_model)
    expected = probe.kl_from_reference_policy(network, network)
    merge_adapter(network)
    assert probe.kl_between(network, start) == pytest.approx(expected, rel=1e-3)
    assert probe.kl_between(start, start) == 0.0


def test_a_fresh_adapter_has_no_divergence(captioner, probe):
    attach_lora(captioner.network, LoraConfig(rank=4, alpha=8, dropout=0.5), seed=0)
    captioner.network.train()
    assert probe.kl_from_reference_policy(captioner.network, captioner.network) == 0.0


def test_no_side_effects(adapted, probe):
    network = adapted.network.train()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    random_state = torch.get_rng_state()
    value = probe.kl_from_reference_policy(network, network)
    assert network.training and network.lm.training
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == trained
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert probe.kl_from_reference_policy(network, network) == value
    assert not network.eval().training
    probe.kl_from_reference_policy(network, network)
    assert not network.training


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_captions(adapted, probe, encoded, monkeypatch, world_size):
    """Five captions on 2 and 4 ranks: every rank has the same number of calls, and padding is not counted."""
    expected = probe.kl_from_reference_policy(adapted.network, adapted.network)
    num_tokens = sum(count for _, count in probe.micro_batches)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    sums, calls = [], []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        rank_probe = KLProbe(encoded, adapted.processor, prompt=adapted.default_prompt(), batch_size=2)
        rank_sums = []
        with monkeypatch.context() as patched:  # the ranks' sums are added up below
            patched.setattr(
                "salmonn.train.kl.dist.all_reduce_sum",
                lambda value, rank_sums=rank_sums: rank_sums.append(value) or 1.0,
            )
            rank_probe.kl_from_reference_policy(adapted.network, adapted.network)
        sums.append(rank_sums)
        calls.append([len(inputs.clip_index) for inputs, _ in rank_probe.micro_batches])
    assert calls == [calls[0]] * world_size and sum(calls[0]) == -(-5 // world_size)
    nats, tokens = (sum(part) for part in zip(*sums, strict=True))
    assert tokens == num_tokens and nats / tokens == pytest.approx(expected, rel=1e-5)


def test_references_without_captions(captioner, encoded):
    options = dict(prompt=captioner.default_prompt())
    references = [Reference(encoded.references[0].video), *encoded.references[1:3]]
    mixed = KLProbe(replace(encoded, references=references), captioner.processor, **options)
    without = KLProbe(replace(encoded, references=references[1:]), captioner.processor, **options)
    assert [count for _, count in mixed.micro_batches] == [count for _, count in without.micro_batches]
    with pytest.raises(ValueError, match=r"none of 1 references has a caption.*kl.num_clips to 0"):
        KLProbe(replace(encoded, references=references[:1]), captioner.processor, **options)
