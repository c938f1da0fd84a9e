"""Answers: with the cache as without, the same for the same seed, and never past their limit."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import Sampling, generate
from salmonn.caption.inputs import Row

DRAWN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=10)


def ids_of(captioner, media, *, sampling: Sampling, rows=None, num_samples=1, seed=0) -> list[list[int]]:
    tokenizer = captioner.processor.tokenizer
    config = sampling.to_transformers(stop_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    inputs = captioner.processor.inputs(rows or [Row(0, "Tell.")], media, pad_left=True)
    return generate(captioner.network, inputs, config=config, num_samples=num_samples, seed=seed)


@torch.no_grad()
def manual(captioner, clip, *, steps: int) -> list[int]:
    """The most likely token, again and again, the whole text anew each time."""
    network, ids = captioner.network, []
    inputs = captioner.processor.inputs([Row(0, "Tell.")], [clip])
    embeds, places = network.embed(inputs), inputs.position_ids
    while len(ids) < steps and captioner.processor.tokenizer.eos_token_id not in ids:
        output = network.lm(inputs_embeds=embeds, position_ids=network.positions(places), use_cache=False)
        ids.append(int(output.logits[0, -1].argmax()))
        places = torch.cat([places, places[..., -1:] + 1], dim=-1)
        embeds = torch.cat([embeds, network.lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


def test_greedy_is_argmax_without_cache(captioner, media):
    answers = [manual(captioner, clip, steps=15) for clip in media[:3]]
    rows = [Row(number, "Tell.") for number in range(3)]
    assert ids_of(captioner, media[:3], sampling=Sampling(max_new_tokens=15), rows=rows) == answers
    assert len({tuple(ids) for ids in answers}) == 3


def test_an_answer_stops_at_the_end_of_the_turn(captioner, media):
    """The third token of the first answer is called the end: that answer stops there, the other goes its own way."""
    rows = [Row(0, "Tell."), Row(1, "Tell.")]
    inputs = captioner.processor.inputs(rows, media[:2], pad_left=True)

    def answers(end: int) -> list[list[int]]:
        config = Sampling(max_new_tokens=6).to_transformers(stop_ids=[end], pad_token_id=0)
        return generate(captioner.network, inputs, config=config)

    endless = answers(999)  # no token of this model
    end = endless[0][2]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in endless]
    assert len(expected[0]) <= 3 < len(endless[0]) == 6
    assert answers(end) == expected


def test_same_seed_same_answers(captioner, media):
    drawn = [ids_of(captioner, media[:1], sampling=DRAWN, num_samples=4, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(ids) for ids in drawn[0]}) == 4  # samples of one clip differ


def test_draws_leave_the_random_state_alone(captioner, media):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ids_of(captioner, media[:1], sampling=DRAWN)
    assert torch.equal(torch.rand(3), expected)


def test_a_tiny_nucleus_is_greedy(captioner, media):
    narrow = Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=8)
    greedy = Sampling(max_new_tokens=8)
    assert ids_of(captioner, media[:1], sampling=narrow) == ids_of(captioner, media[:1], sampling=greedy)


def test_settings_in_the_words_of_transformers():
    config = Sampling(temperature=0.5, top_p=0.8, max_new_tokens=7).to_transformers(stop_ids=[2], pad_token_id=0)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.5, 0.8, 0)
    assert (config.max_new_tokens, config.eos_token_id) == (7, [2])
    assert not Sampling().to_transformers(stop_ids=[2], pad_token_id=0).do_sample


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature must be .* got -0.1"),
        ({"top_p": 0.0}, "top_p must be .* got 0.0"),
        ({"top_p": 1.01}, "top_p must be .* got 1.01"),
        ({"max_new_tokens": 0}, "max_new_tokens must be .* got 0"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**values)


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_the_penalty_is_that_of_transformers(request, videos, model):
    """By hand: logits of ids that were said are divided where positive, else multiplied; below 1 that favours them.

    2+ counts the prompt among them.
    """
    captioner = request.getfixturevalue(model)
    network, processor = captioner.network, captioner.processor
    media = [processor.read(video) for video in videos[:2]]
    rows = [Row(0, "Tell."), Row(1, "Tell me more of it.")]
    inputs = processor.inputs(rows, media, pad_left=True)
    config = Sampling(max_new_tokens=5, repetition_penalty=0.2).to_transformers(stop_ids=[2], pad_token_id=0)
    plain = Sampling(max_new_tokens=5).to_transformers(stop_ids=[2], pad_token_id=0)
    answers = generate(network, inputs, config=config)
    assert answers != generate(network, inputs, config=plain)
    for row, clip, answer in zip(rows, media, answers, strict=False):
        prompt = processor.inputs([replace(row, clip=0)], [clip], pad_left=True).input_ids[0].tolist()
        counted = prompt if model == "plus" else []
        told = by_hand(captioner, replace(row, clip=0), clip, counted, steps=len(answer))
        assert told == answer


@torch.no_grad()
def by_hand(captioner, row, clip, counted: list[int], *, steps: int) -> list[int]:
    network, ids = captioner.network, []
    for _ in range(steps):
        inputs = captioner.processor.inputs([row], [clip], pad_left=True)
        embeds = network.embed(inputs)
        said = network.lm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        positions = inputs.position_ids
        later = positions[..., -1:] + 1 + torch.arange(len(ids))
        logits = network.lm(
            inputs_embeds=torch.cat([embeds, said], dim=1),
            position_ids=network.positions(torch.cat([positions, later], dim=-1)),
        ).logits[0, -1]
        seen = sorted({*counted, *ids})
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 0.2, logits[seen] * 0.2)
        ids.append(int(logits.argmax()))
    return ids


def test_earlier_tokens_are_kept_whatever_the_config_says(captioner, media, monkeypatch):
    """Training leaves use_cache false in a checkpoint's config; each token would go through the whole clip anew."""
    lengths = []
    captioner.network.lm.config.use_cache = captioner.network.lm.generation_config.use_cache = False
    layer = captioner.network.lm.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    ids_of(captioner, media[:1], sampling=Sampling(max_new_tokens=4))
    assert lengths[0] > 100 and lengths[1:] == [1] * (len(lengths) - 1) and len(lengths) > 1


def test_without_a_penalty_of_its_own_the_models_counts(captioner, media):
    def answers(penalty: float | None) -> list[list[int]]:
        return ids_of(captioner, media[:1], sampling=Sampling(max_new_tokens=6, repetition_penalty=penalty))

    none, some = answers(1.0), answers(0.2)
    assert none != some and answers(None) == none
    captioner.network.config.repetition_penalty = 0.2
    assert answers(None) == some and answers(1.0) == none


@pytest.mark.parametrize("family", [None, "salmonn2", "salmonn2-plus"])
def test_samples_share_their_prompt(captioner, published, videos, family):
    """Drawn from one pass over each prompt, they are those of a row for each; prompts are of different lengths."""
    captioner = Captioner.load(published(family)) if family else captioner
    media = [captioner.processor.read(videos[0]), captioner.processor.read(videos[1], end_seconds=3)]
    rows = [Row(0, "Tell."), Row(1, "Tell it all in many words.")]
    shapes = []
    layer = captioner.network.lm.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    shared = ids_of(captioner, media, sampling=DRAWN, rows=rows, num_samples=3, seed=5)
    assert shapes[0][0] == 2 and shapes[0][1] > 100 and set(shapes[1:]) == {(6, 1)}
    alone = ids_of(captioner, media, sampling=DRAWN, rows=[row for row in rows for _ in range(3)], seed=5)
    assert shared == alone and len({tuple(ids) for ids in shared}) > 4
