"""Answers: with the cache as without, the same for the same seed, and never past their limit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import generate, sample_tokens
from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow
from tests.completions import complete

DRAWN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=10)


def ids_of(captioner, media, *, sampling: Sampling, rows=None, num_samples=1, seed=0) -> list[list[int]]:
    rows = rows or [PromptRow(0, "Tell.")]
    return generate(
        captioner.network,
        captioner.processor.collate(rows, media),
        sampling=sampling,
        stop_ids=[captioner.processor.tokenizer.eos_token_id],
        num_samples=num_samples,
        seeds=range(seed, seed + len(rows)),
    )


@torch.no_grad()
def manual(captioner, clip, *, steps: int) -> list[int]:
    """The most likely token, again and again, the whole text anew each time."""
    network, ids = captioner.network, []
    inputs = captioner.processor.collate([PromptRow(0, "Tell.")], [clip])
    embeds, places = network.embed(inputs), inputs.position_ids
    while len(ids) < steps and captioner.processor.tokenizer.eos_token_id not in ids:
        output = network.lm(inputs_embeds=embeds, position_ids=network.family.rotary_positions(places), use_cache=False)
        ids.append(int(output.logits[0, -1].argmax()))
        places = torch.cat([places, places[..., -1:] + 1], dim=-1)
        embeds = torch.cat([embeds, network.lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


def test_greedy_is_argmax_without_cache(captioner, media):
    answers = [manual(captioner, clip, steps=15) for clip in media[:3]]
    rows = [PromptRow(number, "Tell.") for number in range(3)]
    assert ids_of(captioner, media[:3], sampling=Sampling(max_new_tokens=15), rows=rows) == answers
    assert len({tuple(ids) for ids in answers}) == 3


def test_an_answer_stops_at_the_end_of_the_turn(captioner, media):
    """The third token of the first answer is called the end: that answer stops there, the other goes its own way."""
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell.")]
    inputs = captioner.processor.collate(rows, media[:2])

    def answers(end: int) -> list[list[int]]:
        return generate(captioner.network, inputs, sampling=Sampling(max_new_tokens=6), stop_ids=[end])

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


def test_draws_by_hand():
    """Probabilities 0.1, 0.5, 0.4. A nucleus of 0.8 is ids 1 and 2, a mass of 0.9: id 2 from 5 / 9 on."""
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(6, 3)
    chance = torch.tensor([0.0, 0.55, 0.56, 0.88, 0.91, 0.999])

    def ids(**values) -> list[int]:
        return sample_tokens(logits, chance, sampling=Sampling(**values)).tolist()

    assert ids(temperature=1.0, top_p=0.8) == [1, 1, 2, 2, 2, 2]
    assert ids(temperature=1.0, top_p=1.0) == [1, 2, 2, 2, 0, 0]  # up to 0.5, 0.9, 1
    assert ids(temperature=1.0, top_p=0.49) == [1] * 6  # the first reaches it alone
    assert ids() == [1] * 6
    # At temperature 1 / 2 the probabilities are as 0.01, 0.25, 0.16: up to 0.595, 0.976, 1.
    assert ids(temperature=0.5, top_p=1.0) == [1, 1, 1, 2, 2, 0]


def test_the_nucleus_is_that_of_transformers():
    """Every token that can be drawn, and by what share of 4,000 even chances."""
    logits = torch.linspace(0, 3, 50)[torch.randperm(50)]
    kept = TopPLogitsWarper(0.7)(None, TemperatureLogitsWarper(0.6)(None, logits[None]))[0].softmax(-1)
    chance = (torch.arange(4000) + 0.5) / 4000
    drawn = sample_tokens(logits.expand(4000, -1), chance, sampling=Sampling(temperature=0.6, top_p=0.7)).bincount(
        minlength=50
    )
    assert ((drawn > 0) == (kept > 0)).all() and 3 < (kept > 0).sum() < 50
    assert torch.allclose(drawn / 4000, kept, atol=1 / 4000 + 1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature must be .* got -0.1"),
        ({"temperature": 1e-300}, "temperature must be .* got 1e-300"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be"),
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
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell me more of it.")]
    inputs = processor.collate(rows, media)
    sampling = Sampling(max_new_tokens=5, repetition_penalty=0.2)
    answers = generate(network, inputs, sampling=sampling, stop_ids=[2])
    assert answers != generate(network, inputs, sampling=Sampling(max_new_tokens=5), stop_ids=[2])
    for row, clip, answer in zip(rows, media, answers, strict=False):
        prompt = processor.collate([replace(row, clip=0)], [clip]).input_ids[0].tolist()
        counted = prompt if model == "plus" else []
        told = by_hand(captioner, replace(row, clip=0), clip, counted, steps=len(answer))
        assert told == answer


@torch.no_grad()
def by_hand(captioner, row, clip, counted: list[int], *, steps: int) -> list[int]:
    network, ids = captioner.network, []
    for _ in range(steps):
        inputs = captioner.processor.collate([row], [clip])
        embeds = network.embed(inputs)
        said = network.lm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        positions = inputs.position_ids
        later = positions[..., -1:] + 1 + torch.arange(len(ids))
        logits = network.lm(
            inputs_embeds=torch.cat([embeds, said], dim=1),
            position_ids=network.family.rotary_positions(torch.cat([positions, later], dim=-1)),
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
    """One pass over each prompt, whatever its length; what is drawn is what rows computed anew each time draw."""
    captioner = Captioner.load(published(family)) if family else captioner
    captioner.network.prefill_chunk_tokens = 10**6
    media = [captioner.processor.read(videos[0]), captioner.processor.read(videos[1], end_seconds=3)]
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell it all in many words.")]
    shapes = []
    layer = captioner.network.lm.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    shared = ids_of(captioner, media, sampling=DRAWN, rows=rows, num_samples=3, seed=5)
    hook.remove()
    widths = captioner.processor.collate(rows, media).attention_mask.sum(1)
    # Both prompts but for their last tokens, which each of the 6 samples has for itself; then a token each.
    assert shapes[0] == (1, widths.sum() - 2 + 6) and set(shapes[1:]) == {(6, 1)}
    chances = [
        [torch.from_numpy(np.random.default_rng([seed, sample]).random(10, dtype=np.float32)) for sample in range(3)]
        for seed in (5, 6)
    ]
    anew = [
        drawn_anew(captioner, replace(row, clip=0), clip, chance=chance)
        for row, clip, of_row in zip(rows, media, chances, strict=True)
        for chance in of_row
    ]
    assert shared == anew and len({tuple(ids) for ids in shared}) > 4


@torch.no_grad()
def drawn_anew(captioner, row, clip, *, chance) -> list[int]:
    """The whole text goes through transformers' own model for each token."""
    network, ids = captioner.network, []
    inputs = captioner.processor.collate([row], [clip])
    embeds, places = network.embed(inputs), inputs.position_ids
    for one in chance:
        logits = network.lm(
            inputs_embeds=embeds, position_ids=network.family.rotary_positions(places), use_cache=False
        ).logits[:, -1]
        ids.append(int(sample_tokens(logits, one[None], sampling=DRAWN)))
        if ids[-1] == captioner.processor.tokenizer.eos_token_id:
            break
        places = torch.cat([places, places[..., -1:] + 1], dim=-1)
        embeds = torch.cat([embeds, network.lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


def test_answers_that_have_ended_leave(captioner, media):
    """Of 16 samples those that ended leave as soon as they are an eighth; the others say what they say alone."""
    rows, network = [PromptRow(0, "Tell."), PromptRow(1, "Tell.")], captioner.network
    inputs, sizes = captioner.processor.collate(rows, media[:2]), []

    def answers(stop_ids: list[int]) -> list[list[int]]:
        hot = replace(DRAWN, temperature=20.0)
        return generate(network, inputs, sampling=hot, stop_ids=stop_ids, num_samples=8, seeds=[3, 4])

    endless = answers([-1])
    often = sorted(range(400), key=lambda token: -sum(token in ids for ids in endless))[:12]  # call these the end
    hook = network.lm.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ended = answers(often)
    hook.remove()
    places = [next((place for place, token in enumerate(ids) if token in often), len(ids)) for ids in endless]
    assert ended == [ids[: place + 1] for ids, place in zip(endless, places, strict=True)]
    left = [sum(place >= step for place in places) for step in range(1, len(sizes))]  # rows that reach each step
    assert len(set(sizes[1:])) > 2
    assert all(reach <= size < 8 / 7 * reach + 1 for reach, size in zip(left, sizes[1:], strict=True))


def test_questions_on_one_clip_read_it_once(captioner, media):
    seen = []
    captioner.network.lm.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    prompts = ["What can be seen?", "Which colour?", "Tell."]
    sampling = Sampling(max_new_tokens=6)
    (block,) = captioner.encode(media[:1])
    together = complete(captioner, [block] * 3, prompts, sampling=sampling)
    assert len(block) < seen[0][1] < len(block) + 60
    assert together == [complete(captioner, [block], [prompt], sampling=sampling)[0] for prompt in prompts]


def test_samples_depend_on_their_own_seed_alone(captioner, media):
    """Not on what stands beside them, nor on how many of them there are."""
    blocks = captioner.encode(media[:3])
    every = complete(captioner, blocks, ["Tell."] * 3, sampling=DRAWN, num_samples=4, seeds=[7, 8, 9])
    alone = complete(captioner, blocks[1:2], ["Tell."], sampling=DRAWN, num_samples=2, seeds=[8])
    assert every[4:6] == alone and every[:4] != every[4:8]
    short = complete(
        captioner, blocks[:1], ["Tell."], sampling=replace(DRAWN, max_new_tokens=3), num_samples=4, seeds=[7]
    )
    assert all(whole.text.startswith(cut.text[:-1]) for whole, cut in zip(every, short, strict=False))
    in_turn = complete(captioner, blocks, ["Tell."] * 3, sampling=DRAWN, num_samples=4, seeds=[7, 8, 9], batch_size=4)
    assert in_turn == every


def test_numbers_gone_wrong_draw_a_token_of_the_row():
    """Of logits that are not numbers no nucleus can be made; one row's must not end what stands beside it."""
    logits = torch.tensor([[float("nan")] * 4, [0.0, 9.0, 0.0, 0.0]])
    tokens = sample_tokens(logits, torch.tensor([0.5, 0.5]), sampling=Sampling(temperature=1.0, top_p=0.5))
    assert 0 <= tokens[0] < 4 and tokens[1] == 1


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_prompts_may_be_read_clip_by_clip(request, videos, monkeypatch, model):
    """Three clips with two questions each, all at once, two clips together, and one by one."""
    captioner = request.getfixturevalue(model)
    network, processor = captioner.network, captioner.processor
    media = [processor.read(video) for video in videos[:3]]
    inputs = processor.collate(
        [PromptRow(clip, words) for words in ("Tell.", "What is heard?") for clip in range(3)], media
    )
    two_clips = int(inputs.attention_mask[:2].sum()) + 30
    passes = []
    decode = network._run_decoder
    monkeypatch.setattr(network, "_run_decoder", lambda *args: passes.append(args[0].shape[:2]) or decode(*args))
    given = []
    for at_once in (10**6, two_clips, 1):
        monkeypatch.setattr(network, "prefill_chunk_tokens", at_once)
        passes.clear()
        given.append(generate(network, inputs, sampling=Sampling(max_new_tokens=8), stop_ids=[2]))
        given.append(len([shape for shape in passes if shape[0] == 1 and shape[1] > 6]))
    assert given[0] == given[2] == given[4]
    assert given[1::2] == [1, 2, 3]
