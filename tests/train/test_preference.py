"""Preference batches and their loss on a real network: reference, first value, direction."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.conversations import Turn
from salmonn.model.lora import LoraConfig, attach_lora
from salmonn.preference.losses import LossConfig, make_loss
from salmonn.records import Comparison, read_json, write_json
from salmonn.train.data import ClipSource, SftBatches, TrainingExample, sft_loss
from salmonn.train.loop import FitConfig, FitContext, autocast, fit
from salmonn.train.preference import (
    REFERENCE_LOGPS_NAME,
    MixedBatches,
    MixedBatchLoss,
    PreferenceBatches,
    PreferenceBatchLoss,
    PreferenceExample,
    compute_reference_logps,
)

LORA = LoraConfig(rank=4, dropout=0.0)
LOSS = make_loss(LossConfig())


def to_examples(pairs, blocks) -> list[PreferenceExample]:
    return [PreferenceExample(pair, blocks[pair.video]) for pair in pairs]


def compute(captioner, examples, *, batch_size=2, **options) -> list[tuple[float, float]]:
    """Reference log-probabilities (chosen, rejected) of each pair."""
    logps = compute_reference_logps(
        captioner.network,
        examples,
        captioner.processor,
        roles=LOSS.reference_roles,
        batch_size=batch_size,
        **options,
    )
    return [(one["chosen"], one["rejected"]) for one in logps]


def make_batches(captioner, examples, *, reference=None, batch_size, **options) -> PreferenceBatches:
    reference = compute(captioner, examples) if reference is None else reference
    logps = [dict(zip(("chosen", "rejected"), values, strict=True)) for values in reference]
    options = {"roles": LOSS.roles, "seed": 0} | options
    return PreferenceBatches(examples, logps, captioner.processor, batch_size=batch_size, **options)


@pytest.fixture
def pairs(clips):
    """Three pairs on three clips, of different lengths."""
    texts = [("a red star appears", "a tone", "the truth"), ("two", "a low tone is heard", "three"), ("x", "y", "z z")]
    return [
        Comparison(reference.video, f"Tell {number}.", *text)
        for number, (reference, text) in enumerate(zip(clips.references, texts, strict=False))
    ]


@pytest.fixture
def blocks(captioner, media, clips):
    tokens = captioner.encode(media)
    return {reference.video: block for reference, block in zip(clips.references, tokens, strict=True)}


def answer_logp(captioner, pair, text, block) -> float:
    """Log-probability of one answer, alone in its batch."""
    with torch.no_grad():
        inputs = captioner.processor.collate([PromptRow(0, pair.prompt, text)], [block])
        return captioner.network(inputs).sum().item()


def test_reference_is_the_network_without_adapter(captioner, fill_adapter, pairs, blocks):
    expected = [
        [answer_logp(captioner, pair, text, blocks[pair.video]) for text in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    attach_lora(captioner.network, LORA, seed=0)
    fill_adapter(captioner.network)
    captioner.network.eval()
    computed = compute(captioner, to_examples(pairs, blocks))
    assert len(computed) == 3
    for pair, reference, by_hand in zip(pairs, computed, expected, strict=True):
        assert reference == pytest.approx(by_hand, rel=1e-5)
        assert answer_logp(captioner, pair, pair.chosen, blocks[pair.video]) != pytest.approx(by_hand[0], rel=1e-3)


def test_pairs_on_one_clip_are_asked_about_together(captioner, pairs, blocks, monkeypatch):
    """Its tokens stand in the batch once, and every answer still has its own log-probability."""
    both = [pairs[0], pairs[1], replace(pairs[0], prompt="Tell more.", chosen="two"), pairs[2]]
    expected = [
        [answer_logp(captioner, pair, text, blocks[pair.video]) for text in (pair.chosen, pair.rejected)]
        for pair in both
    ]
    attach_lora(captioner.network, LORA, seed=0)
    asked: list = []
    forward = captioner.network.forward
    monkeypatch.setattr(captioner.network, "forward", lambda inputs: asked.append(inputs) or forward(inputs))
    computed = compute(captioner, to_examples(both, blocks), batch_size=9)
    assert [logp for values in computed for logp in values] == pytest.approx(
        [one for two in expected for one in two], rel=1e-5
    )
    (inputs,) = asked
    assert len(inputs.clip_features) == 3 and len(inputs.input_ids) == 8


@pytest.fixture
def asked(captioner, fill_adapter, pairs, blocks, tmp_path, monkeypatch):
    """Asks the reference policy in batches of one pair, and says what it answered and how often it was run."""
    attach_lora(captioner.network, LORA, seed=0)
    fill_adapter(captioner.network)
    captioner.network.eval()
    runs, forward = [], captioner.network.forward
    monkeypatch.setattr(captioner.network, "forward", lambda inputs: runs.append(inputs) or forward(inputs))

    def ask(given=None, clips=None, *, size=1):
        runs.clear()
        computed = compute(captioner, to_examples(given or pairs, clips or blocks), batch_size=size, folder=tmp_path)
        return computed, len(runs)

    return ask


def test_a_run_that_goes_on_asks_for_a_sample_alone(asked, tmp_path, caplog):
    said, runs = asked()
    assert runs == 3
    first = (tmp_path / REFERENCE_LOGPS_NAME).read_bytes()
    again, runs = asked()
    assert again == said and runs == 1 and (tmp_path / REFERENCE_LOGPS_NAME).read_bytes() == first
    again, runs = asked(size=2)  # other batches may round otherwise; what is kept is what is taken
    assert again == said and runs == 1 and not caplog.records
    # Two runs of the same give the same, to the last bit.
    (tmp_path / REFERENCE_LOGPS_NAME).unlink()
    assert asked()[0] == said and (tmp_path / REFERENCE_LOGPS_NAME).read_bytes() == first


def test_an_adapter_that_has_learnt_changes_no_reference(captioner, asked, fill_adapter):
    """The run goes on in the midst of training, or from a fresh adapter of another seed."""
    said, _ = asked()
    with torch.no_grad():
        for name, value in captioner.network.named_parameters():
            if ".lora_" in name:
                value.add_(1)
    again, runs = asked()
    assert again == said and runs == 1


def change_weights(captioner, pairs, blocks):
    with torch.no_grad():
        captioner.network.get_parameter("lm.base_model.model.model.norm.weight").mul_(1.5)


def change_frames(captioner, pairs, blocks):
    """All tokens a little, which a sample would hardly tell."""
    for video, block in blocks.items():
        blocks[video] = replace(block, tokens=block.tokens + 1e-6)


def change_prompt(captioner, pairs, blocks):
    pairs[2] = replace(pairs[2], prompt="Tell all.")


def change_answer(captioner, pairs, blocks):
    pairs[2] = replace(pairs[2], rejected="no")


def change_history(captioner, pairs, blocks):
    pairs[2] = replace(pairs[2], history=(("Who?", "A star."),))


def change_order(captioner, pairs, blocks):
    pairs.reverse()


def change_system(captioner, pairs, blocks):
    captioner.processor.config.system_prompt = "Be brief."


@pytest.mark.parametrize(
    "change",
    [change_weights, change_frames, change_prompt, change_answer, change_history, change_order, change_system],
)
def test_what_the_reference_depends_on_makes_it_anew(captioner, asked, pairs, blocks, caplog, tmp_path, change):
    said, _ = asked()
    change(captioner, pairs, blocks)
    now, runs = asked()
    assert runs == 3 and now != said
    assert "is from different weights, clips, comparisons or tokens" in caplog.text
    assert asked() == (now, 1)


def test_a_sample_that_differs_makes_it_anew(asked, tmp_path, caplog):
    """What no hash sees, such as another version of torch; the first batch is of the longest clip."""
    path = tmp_path / REFERENCE_LOGPS_NAME
    said, _ = asked()
    values = read_json(path)
    write_json(path, values | {"logps": [{"chosen": chosen + 0.01, "rejected": rejected} for chosen, rejected in said]})
    again, runs = asked()
    assert again == said and runs == 1 + 3 and "more than rounding error" in caplog.text
    assert read_json(path) == values


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 0, "fingerprint": "", "logps": []}'])
def test_a_reference_that_cannot_be_read_is_made_anew(asked, tmp_path, caplog, text):
    said, _ = asked()
    (tmp_path / REFERENCE_LOGPS_NAME).write_text(text)
    again, runs = asked()
    assert again == said and runs == 3 and "recomputing" in caplog.text


def test_another_type_is_another_reference(asked):
    said, _ = asked()
    with autocast("bfloat16"):
        rounded, runs = asked()
        assert runs == 3 and rounded != said
        assert asked(size=2) == (rounded, 1)  # whose batches round more, and no more than they may
    assert asked() == (said, 3)


@pytest.mark.parametrize("roles", [("chosen", "rejected", "ground_truth"), ("ground_truth", "chosen"), ("rejected",)])
def test_rows_of_each_role_hold_its_answers(captioner, pairs, blocks, roles):
    reference = [(-1.0, -10.0), (-2.0, -20.0), (-3.0, -30.0)]
    batches = make_batches(captioner, to_examples(pairs, blocks), reference=reference, batch_size=3, roles=roles)
    (batch,) = batches.micro_batches(0)
    tokenizer = captioner.processor.tokenizer
    answers = [tokenizer.decode(labels[labels != -100], skip_special_tokens=True) for labels in batch.inputs.labels]
    prompts = [tokenizer.decode(ids[ids >= 0]) for ids in batch.inputs.input_ids]  # placeholders are below 0
    order = [int(-value) - 1 for value in batch.reference_logps["chosen"]]
    assert sorted(order) == [0, 1, 2] and tuple(batch.rows) == roles and len(answers) == 3 * len(roles)
    assert batch.reference_logps["rejected"].tolist() == [-10.0 * (number + 1) for number in order]
    for role, rows in batch.rows.items():
        assert answers[rows] == [getattr(pairs[number], role) for number in order]
        assert all(pairs[number].prompt in prompt for number, prompt in zip(order, prompts[rows], strict=True))
        assert batch.inputs.clip_index[rows] == (0, 1, 2)
    for place, number in enumerate(order):
        assert torch.equal(batch.inputs.clip_features[place], blocks[pairs[number].video].tokens)


def test_ranks_share_the_pairs(captioner, pairs, blocks, monkeypatch):
    reference = [(-1.0, -10.0), (-2.0, -20.0)]
    batches = make_batches(captioner, to_examples(pairs[:2], blocks), reference=reference, batch_size=2)
    (whole,) = batches.micro_batches(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        (part,) = batches.micro_batches(0)
        assert part.reference_logps["chosen"].tolist() == [whole.reference_logps["chosen"][rank].item()]
        assert len(part.inputs.input_ids) == 3


def test_loss_of_a_fresh_adapter(captioner, pairs, blocks):
    """The policy is its reference still: log 2, and the weighted mean cross-entropy of the ground truths."""
    expected = [
        -answer_logp(captioner, pair, pair.ground_truth, blocks[pair.video])
        / (len(captioner.processor.tokenizer.encode(pair.ground_truth)) + 1)
        for pair in pairs
    ]
    attach_lora(captioner.network, LORA, seed=0)
    batches = make_batches(captioner, to_examples(pairs, blocks), batch_size=3)
    batch_loss = PreferenceBatchLoss(make_loss(LossConfig(beta=0.1, ce_weight=0.25)))
    loss, figures = batch_loss(captioner.network, *batches.micro_batches(0))
    cross_entropy = sum(expected) / 3
    assert loss.item() == pytest.approx(math.log(2) + 0.25 * cross_entropy, rel=1e-5)
    assert figures["ce"] == pytest.approx(cross_entropy, rel=1e-5)
    assert figures["dpo"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(figures["chosen"]) < 1e-4 and abs(figures["rejected"]) < 1e-4


def test_figures_of_a_moved_policy(captioner, fill_adapter, pairs, blocks):
    attach_lora(captioner.network, LORA, seed=0)
    examples = to_examples(pairs[:1], blocks)
    (before,) = reference = compute(captioner, examples)
    batches = make_batches(captioner, examples, reference=reference, batch_size=1)
    fill_adapter(captioner.network)
    captioner.network.eval()
    batch_loss = PreferenceBatchLoss(make_loss(LossConfig(beta=0.5, ce_weight=0.0)))
    loss, figures = batch_loss(captioner.network, *batches.micro_batches(0))
    pair, block = pairs[0], blocks[pairs[0].video]
    rewards = [
        0.5 * (answer_logp(captioner, pair, text, block) - reference)
        for text, reference in zip((pair.chosen, pair.rejected), before, strict=True)
    ]
    assert [figures["chosen"], figures["rejected"]] == pytest.approx(rewards, rel=1e-3)
    assert loss.item() == pytest.approx(math.log1p(math.exp(rewards[1] - rewards[0])), rel=1e-3)
    assert figures["accuracy"] == float(rewards[0] > rewards[1])


@pytest.mark.parametrize("turned", [False, True])
def test_a_few_steps_prefer_the_chosen_one(captioner, pairs, blocks, tmp_path, turned):
    """Whichever of the two is called chosen: the margin over the reference grows on its side."""
    pair = pairs[0]
    if turned:
        pair = Comparison(pair.video, pair.prompt, pair.rejected, pair.chosen, pair.ground_truth)
    attach_lora(captioner.network, LORA, seed=0)
    examples = to_examples([pair], blocks)
    (before,) = reference = compute(captioner, examples)
    fit(
        captioner.network,
        make_batches(captioner, examples, reference=reference, batch_size=1),
        PreferenceBatchLoss(make_loss(LossConfig(ce_weight=0.0))),
        FitConfig(learning_rate=3e-3, steps=8, warmup_ratio=0.125, batch_size=1),
        context=FitContext("one pair", tmp_path),
    )
    figures = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert figures[-1]["chosen"] > figures[-1]["rejected"] + 0.1
    assert figures[-1]["loss"] < figures[0]["loss"] and figures[-1]["accuracy"] == 1.0
    now = [answer_logp(captioner, pair, text, blocks[pair.video]) for text in (pair.chosen, pair.rejected)]
    assert now[0] - before[0] > now[1] - before[1]


@pytest.fixture
def mixed(captioner, pairs, blocks):
    """Three pairs and two clips with two questions each a step, one by one."""
    attach_lora(captioner.network, LORA, seed=0)
    options = {"seed": 0, "gradient_accumulation_steps": 9}
    preferences = make_batches(captioner, to_examples(pairs, blocks), batch_size=3, **options)
    turns = (Turn("How many?", "two"), Turn("Which?", "the star"))
    examples = [TrainingExample(ClipSource(Path(pair.video)), turns) for pair in pairs[:2]]
    features = {example.clip: blocks[str(example.clip.video)] for example in examples}
    questions = SftBatches(examples, captioner.processor, features.__getitem__, batch_size=2, first_rank=3, **options)
    return MixedBatches(preferences, questions)


def test_questions_among_pairs_count_by_their_share(captioner, fill_adapter, mixed):
    fill_adapter(captioner.network)
    network, loss = captioner.network.eval(), MixedBatchLoss(LOSS, qa_fraction=0.4)
    micro_batches = mixed.micro_batches(0)
    assert len(micro_batches) == 5
    total = sum(loss(network, piece)[0].item() for piece in micro_batches)
    alone = sum(PreferenceBatchLoss(LOSS)(network, piece)[0].item() for piece in mixed.preferences.micro_batches(0))
    asked = sum(sft_loss(network, piece)[0].item() for piece in mixed.questions.micro_batches(0))
    assert total == pytest.approx(0.6 * alone + 0.4 * asked, rel=1e-5) and alone > 0 and asked > 0
    figures = [loss(network, piece)[1] for piece in micro_batches]
    assert sum(each.get("qa", 0.0) for each in figures) == pytest.approx(asked, rel=1e-5)
    whole, _ = MixedBatchLoss(LOSS, qa_fraction=0.0)(network, micro_batches[0])
    assert torch.equal(whole, PreferenceBatchLoss(LOSS)(network, micro_batches[0])[0])


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_share_pairs_and_questions_evenly(mixed, monkeypatch, size):
    whole = mixed.micro_batches(0)
    monkeypatch.setenv("WORLD_SIZE", str(size))
    counts = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(len(mixed.micro_batches(0)))
    assert sum(counts) == len(whole) and max(counts) - min(counts) <= 1
