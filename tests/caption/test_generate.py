"""Generation: cached equals uncached, seeds, sampling parameters, stop tokens and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from salmonn.caption import generate as generate_module
from salmonn.caption import nucleus
from salmonn.caption.captioner import Captioner
from salmonn.caption.generate import DecodeBatch, SampledToken, compute_logprobs, to_sampled_tokens
from salmonn.caption.generator import SHIPPED_MODEL, Sampling
from salmonn.caption.limits import BatchLimits
from salmonn.caption.nucleus import TokenDraft
from salmonn.caption.processor import PromptRow
from salmonn.model.kv_cache import KVCache
from tests.completions import complete, generate

SAMPLED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=10)


def token_ids(captioner, media, *, sampling: Sampling, rows=None, num_samples=1, seed=0) -> list[list[int]]:
    rows = rows or [PromptRow(0, "Tell.")]
    return generated_ids(
        captioner.network,
        captioner.processor.collate(rows, media),
        sampling=sampling,
        stop_ids=[captioner.processor.tokenizer.eos_token_id],
        num_samples=num_samples,
        seeds=range(seed, seed + len(rows)),
    )


def generated_ids(*args, **options) -> list[list[int]]:
    return [[token.id for token in row] for row in generate(*args, **options)]


@torch.no_grad()
def decode_greedily(captioner, clip, *, steps: int) -> list[int]:
    """Decode greedily without a cache: the whole text is recomputed for each token."""
    network, ids = captioner.network, []
    inputs = captioner.processor.collate([PromptRow(0, "Tell.")], [clip])
    embeds, positions = network.embed(inputs), inputs.position_ids
    while len(ids) < steps and captioner.processor.tokenizer.eos_token_id not in ids:
        output = network.lm(
            inputs_embeds=embeds, position_ids=network.family.rotary_positions(positions), use_cache=False
        )
        ids.append(int(output.logits[0, -1].argmax()))
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        embeds = torch.cat([embeds, network.lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


def test_greedy_is_argmax_without_cache(captioner, media):
    answers = [decode_greedily(captioner, clip, steps=8) for clip in media[:2]]
    rows = [PromptRow(number, "Tell.") for number in range(2)]
    assert token_ids(captioner, media[:2], sampling=Sampling(max_new_tokens=8), rows=rows) == answers
    assert answers[0] != answers[1]


def test_an_answer_ends_at_a_stop_token(captioner, media):
    """The third token of the first answer is made the stop token; the other answer is independent of it."""
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell.")]
    inputs = captioner.processor.collate(rows, media[:2])

    def answers(stop_id: int) -> list[list[int]]:
        return generated_ids(captioner.network, inputs, sampling=Sampling(max_new_tokens=6), stop_ids=[stop_id])

    unstopped = answers(999)  # not a token of this model
    stop_id = unstopped[0][2]
    expected = [ids[: ids.index(stop_id) + 1] if stop_id in ids else ids for ids in unstopped]
    assert len(expected[0]) <= 3 < len(unstopped[0]) == 6
    assert answers(stop_id) == expected


def test_same_seed_same_answers(captioner, media):
    answers = [token_ids(captioner, media[:1], sampling=SAMPLED, num_samples=4, seed=seed) for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]
    assert len({tuple(ids) for ids in answers[0]}) == 4  # samples of one clip differ


def sample_tokens(logits, uniforms, *, sampling) -> torch.Tensor:
    """Return the final tokens of a draft, with the same arguments."""
    draft = TokenDraft(logits, uniforms, sampling=sampling)
    if not draft.is_final:
        draft.correct()
    return draft.tokens


def test_sampling_does_not_change_the_random_state(captioner, media):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    token_ids(captioner, media[:1], sampling=SAMPLED)
    assert torch.equal(torch.rand(3), expected)


def test_a_tiny_nucleus_is_greedy(captioner, media):
    narrow = Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=8)
    greedy = Sampling(max_new_tokens=8)
    assert token_ids(captioner, media[:1], sampling=narrow) == token_ids(captioner, media[:1], sampling=greedy)


def test_sampled_tokens_by_hand():
    """Probabilities 0.1, 0.5, 0.4: a nucleus of 0.8 is ids 1 and 2 with a mass of 0.9, so id 2 starts at 5 / 9."""
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.55, 0.56, 0.88, 0.91, 0.999])

    def ids(**values) -> list[int]:
        return sample_tokens(logits, uniforms, sampling=Sampling(**values)).tolist()

    assert ids(temperature=1.0, top_p=0.8) == [1, 1, 2, 2, 2, 2]
    assert ids(temperature=1.0, top_p=1.0) == [1, 2, 2, 2, 0, 0]  # cumulative: 0.5, 0.9, 1
    assert ids(temperature=1.0, top_p=0.49) == [1] * 6  # the most likely token suffices
    assert ids() == [1] * 6
    # At temperature 1 / 2 the probabilities are proportional to 0.01, 0.25, 0.16; cumulative: 0.595, 0.976, 1.
    assert ids(temperature=0.5, top_p=1.0) == [1, 1, 1, 2, 2, 0]


def test_the_nucleus_equals_that_of_transformers():
    """Compare the frequency of each token at 4,000 evenly spaced uniform values."""
    logits = torch.linspace(0, 3, 50)[torch.randperm(50)]
    expected = TopPLogitsWarper(0.7)(None, TemperatureLogitsWarper(0.6)(None, logits[None]))[0].softmax(-1)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    counts = sample_tokens(logits.expand(4000, -1), uniforms, sampling=Sampling(temperature=0.6, top_p=0.7)).bincount(
        minlength=50
    )
    assert ((counts > 0) == (expected > 0)).all() and 3 < (expected > 0).sum() < 50
    assert torch.allclose(counts / 4000, expected, atol=1 / 4000 + 1e-6)


def test_a_nucleus_of_a_large_vocabulary(monkeypatch):
    """It is found among the most likely tokens, in all rows, or else by sorting all tokens, with the same result."""
    torch.manual_seed(0)
    peaked, flat = 4 * torch.randn(64, 9000), 0.1 * torch.randn(64, 9000)
    uniforms, sampling, sort, num_sorted = torch.rand(64), Sampling(temperature=1.0, top_p=0.95), torch.Tensor.sort, []
    monkeypatch.setattr(torch.Tensor, "sort", lambda *args, **kwargs: num_sorted.append(1) or sort(*args, **kwargs))
    found = [sample_tokens(logits, uniforms, sampling=sampling) for logits in (peaked, flat)]
    assert len(num_sorted) == 1
    monkeypatch.setattr(nucleus, "NUCLEUS_TOKENS", 9000)
    expected = [sample_tokens(logits, uniforms, sampling=sampling) for logits in (peaked, flat)]
    assert len(num_sorted) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_samples_do_not_depend_on_other_rows():
    """Logits in 16 bits are often equal, and their order must not depend on rows whose nucleus is too large."""
    torch.manual_seed(0)
    peaked, flat = (4 * torch.randn(64, 9000)).bfloat16().float(), torch.zeros(1, 9000)
    uniforms, sampling = torch.rand(65), Sampling(temperature=1.0, top_p=0.95)
    alone = sample_tokens(peaked, uniforms[:64], sampling=sampling)
    beside = sample_tokens(torch.cat([peaked, flat]), uniforms, sampling=sampling)
    assert torch.equal(alone, beside[:64])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be .* got -0.1"),
        ({"temperature": 1e-300}, "temperature must be .* got 1e-300"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be"),
        ({"top_p": 0.0}, "top_p must be .* got 0.0"),
        ({"top_p": 1.01}, "top_p must be .* got 1.01"),
        ({"max_new_tokens": 0}, "max_new_tokens must be .* got 0"),
        ({"stop": ("a", "")}, "stop must not contain an empty string"),
    ],
)
def test_invalid_values_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_the_repetition_penalty_by_hand(request, videos, model):
    """Logits of earlier tokens are divided by the penalty if positive, else multiplied; below 1 that favours them.

    salmonn2-plus also penalizes tokens of the prompt.
    """
    captioner = request.getfixturevalue(model)
    network, processor = captioner.network, captioner.processor
    media = [processor.read(video, end_seconds=2.0) for video in videos[:2]]
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell me more of it.")]
    inputs = processor.collate(rows, media)
    sampling = Sampling(max_new_tokens=5, repetition_penalty=0.2)
    answers = generated_ids(network, inputs, sampling=sampling, stop_ids=[2])
    assert answers != generated_ids(network, inputs, sampling=Sampling(max_new_tokens=5), stop_ids=[2])
    for row, clip, answer in zip(rows, media, answers, strict=False):
        prompt = processor.collate([replace(row, clip=0)], [clip]).input_ids[0].tolist()
        penalized = prompt if model == "plus" else []
        assert decode_with_penalty(captioner, replace(row, clip=0), clip, penalized, steps=len(answer)) == answer


@torch.no_grad()
def decode_with_penalty(captioner, row, clip, penalized: list[int], *, steps: int) -> list[int]:
    network, ids = captioner.network, []
    for _ in range(steps):
        inputs = captioner.processor.collate([row], [clip])
        embeds = network.embed(inputs)
        answer_embeds = network.lm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        positions = inputs.position_ids
        answer_positions = positions[..., -1:] + 1 + torch.arange(len(ids))
        logits = network.lm(
            inputs_embeds=torch.cat([embeds, answer_embeds], dim=1),
            position_ids=network.family.rotary_positions(torch.cat([positions, answer_positions], dim=-1)),
        ).logits[0, -1]
        earlier = sorted({*penalized, *ids})
        logits[earlier] = torch.where(logits[earlier] > 0, logits[earlier] / 0.2, logits[earlier] * 0.2)
        ids.append(int(logits.argmax()))
    return ids


def test_the_kv_cache_is_used_whatever_the_config_says(captioner, media, monkeypatch):
    """Training sets use_cache to false in a checkpoint's config; the clip would be recomputed for each token."""
    lengths = []
    captioner.network.lm.config.use_cache = captioner.network.lm.generation_config.use_cache = False
    layer = captioner.network.lm.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    token_ids(captioner, media[:1], sampling=Sampling(max_new_tokens=4))
    assert lengths[0] > 100 and lengths[1:] == [1] * (len(lengths) - 1) and len(lengths) > 1


def test_the_repetition_penalty_defaults_to_the_models(captioner, media):
    def answers(penalty: float | None) -> list[list[int]]:
        return token_ids(captioner, media[:1], sampling=Sampling(max_new_tokens=6, repetition_penalty=penalty))

    without, with_penalty = answers(1.0), answers(0.2)
    assert without != with_penalty and answers(None) == without
    captioner.network.config.repetition_penalty = 0.2
    assert answers(None) == with_penalty and answers(1.0) == without


@pytest.mark.parametrize("family", [None, "salmonn2", "salmonn2-plus"])
def test_samples_share_their_prompt(captioner, published, videos, family):
    """One pass over each prompt, whatever its length; the samples equal those of rows computed without a cache."""
    captioner = Captioner.load(published(family)) if family else captioner
    captioner.network.prefill_chunk_tokens = 10**6
    media = [captioner.processor.read(video, end_seconds=end) for video, end in zip(videos, (2.5, 1), strict=False)]
    rows = [PromptRow(0, "Tell."), PromptRow(1, "Tell it all in many words.")]
    sampling, shapes = replace(SAMPLED, max_new_tokens=5), []
    layer = captioner.network.lm.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    shared = token_ids(captioner, media, sampling=sampling, rows=rows, num_samples=3, seed=7)
    hook.remove()
    widths = captioner.processor.collate(rows, media).attention_mask.sum(1)
    # Both prompts except for their last tokens, which each of the 6 samples computes itself; then a token each.
    assert shapes[0] == (1, widths.sum() - 2 + 6) and set(shapes[1:]) == {(6, 1)}
    uniforms = [
        [torch.from_numpy(np.random.default_rng([seed, sample]).random(5, dtype=np.float32)) for sample in range(3)]
        for seed in (7, 8)
    ]
    expected = [
        sample_without_cache(captioner, replace(row, clip=0), clip, uniforms=values)
        for row, clip, row_uniforms in zip(rows, media, uniforms, strict=True)
        for values in row_uniforms
    ]
    assert shared == expected and len({tuple(ids) for ids in shared}) > 4


@torch.no_grad()
def sample_without_cache(captioner, row, clip, *, uniforms) -> list[int]:
    """Sample with transformers' model, which recomputes the whole text for each token."""
    network, ids = captioner.network, []
    inputs = captioner.processor.collate([row], [clip])
    embeds, positions = network.embed(inputs), inputs.position_ids
    for value in uniforms:
        logits = network.lm(
            inputs_embeds=embeds, position_ids=network.family.rotary_positions(positions), use_cache=False
        ).logits[:, -1]
        ids.append(int(sample_tokens(logits, value[None], sampling=SAMPLED)))
        if ids[-1] == captioner.processor.tokenizer.eos_token_id:
            break
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        embeds = torch.cat([embeds, network.lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


def test_finished_rows_are_removed(captioner, media):
    """Finished rows are removed once they are an eighth of the 16 rows; the other answers do not change."""
    rows, network = [PromptRow(0, "Tell."), PromptRow(1, "Tell.")], captioner.network
    inputs, sizes = captioner.processor.collate(rows, media[:2]), []

    def answers(stop_ids: list[int]) -> list[list[int]]:
        hot = replace(SAMPLED, temperature=20.0)
        return generated_ids(network, inputs, sampling=hot, stop_ids=stop_ids, num_samples=8, seeds=[3, 4])

    unstopped = answers([-1])
    most_frequent = sorted(range(400), key=lambda token: -sum(token in ids for ids in unstopped))
    stop_ids = most_frequent[:12]
    hook = network.lm.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ended = answers(stop_ids)
    hook.remove()
    lengths = [next((index for index, token in enumerate(ids) if token in stop_ids), len(ids)) for ids in unstopped]
    assert ended == [ids[: length + 1] for ids, length in zip(unstopped, lengths, strict=True)]
    num_active = [sum(length >= step for length in lengths) for step in range(1, len(sizes))]  # at each step
    assert len(set(sizes[1:])) > 2
    assert all(active <= size < 8 / 7 * active + 1 for active, size in zip(num_active, sizes[1:], strict=True))


def test_decoding_ahead_gives_the_same_tokens(captioner, media, monkeypatch):
    """Rows join, end at a stop token, at their limit or because they are cancelled, some before their first token.

    Ahead, tokens are drafted from the most likely ones; where these are too few, the next step is done again.
    """
    inputs = captioner.processor.collate([PromptRow(0, "Tell."), PromptRow(1, "Say.")], media[:2])
    hot, steps = replace(SAMPLED, temperature=4.0, top_p=0.8, repetition_penalty=1.3), []
    num_again, rewind = [], KVCache.rewind
    monkeypatch.setattr(KVCache, "rewind", lambda cache: num_again.append(1) or rewind(cache))
    monkeypatch.setattr(generate_module, "NUM_SORTED_STEPS", 1)

    def tokens(*, is_ahead: bool, stop_ids: list[int]) -> dict[int, list[SampledToken]]:
        monkeypatch.setattr(nucleus, "NUCLEUS_TOKENS", 40 if is_ahead else 9000)
        batch, found = DecodeBatch(captioner.network, stop_ids=stop_ids, is_ahead=is_ahead), {}
        batch.add(inputs, sampling=hot, num_samples=4, seeds=[1, 2])
        for step in range(100):
            if step in (2, 5):
                sampling = replace(hot, max_new_tokens=4, logprobs=1 if step == 5 else None)
                batch.add(inputs, sampling=sampling, num_samples=2, seeds=[step, step + 1])
            for row, token in batch.step({2: {1, 9}, 5: {12, 13, 14, 15}, 6: {3}}.get(step, ())).items():
                found.setdefault(row, []).append(token)
            if not batch:
                steps.append(step)
                return found
        raise AssertionError("the batch does not end")

    first = tokens(is_ahead=False, stop_ids=[-1])
    stop_ids = [first[0][4].id, first[2][1].id, first[8][2].id]
    expected, found = (tokens(is_ahead=is_ahead, stop_ids=stop_ids) for is_ahead in (False, True))
    ids = [{row: [token.id for token in of] for row, of in one.items()} for one in (expected, found)]
    assert ids[0] == ids[1] and len(set(map(len, ids[0].values()))) > 3
    assert 9 not in ids[0] and len(ids[0][1]) == 2 and len(ids[0]) == 11
    assert steps[1] == steps[2] and 2 < len(num_again) < steps[2]


def test_rows_end_at_their_stop_strings(captioner, media):
    """The batch ends with the last row that has one; without it would take 100 steps."""
    hot, sizes = Sampling(temperature=1.5, max_new_tokens=100), []
    whole = complete(captioner, media[:1], ["Tell."], sampling=hot, num_samples=4)
    stops = tuple(one.text[10 + number :][:4] for number, one in enumerate(whole))
    hook = (
        captioner.network.lm.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    )
    stopped = complete(captioner, media[:1], ["Tell."], sampling=replace(hot, stop=stops), num_samples=4)
    hook.remove()
    for one, full in zip(stopped, whole, strict=True):
        end = min(full.text.index(stop) for stop in stops if stop in full.text)
        assert one.finished and one.text == full.text[:end].rstrip()
    assert len(sizes) < 50 and len(set(sizes[1:])) > 1


def test_questions_on_one_clip_share_its_prefill(captioner, media):
    shapes = []
    captioner.network.lm.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    prompts = ["What can be seen?", "Which colour?", "Tell."]
    sampling = Sampling(max_new_tokens=6)
    (features,) = captioner.encode(media[:1])
    together = complete(captioner, [features] * 3, prompts, sampling=sampling)
    assert len(features) < shapes[0][1] < len(features) + 60
    assert together == [complete(captioner, [features], [prompt], sampling=sampling)[0] for prompt in prompts]


def test_samples_depend_only_on_their_own_seed(captioner, media):
    """They depend neither on the other rows of the batch nor on the number of samples."""
    features = captioner.encode(media[:3])
    every = complete(captioner, features, ["Tell."] * 3, sampling=SAMPLED, num_samples=4, seeds=[7, 8, 9])
    separate = complete(captioner, features[1:2], ["Tell."], sampling=SAMPLED, num_samples=2, seeds=[8])
    assert every[4:6] == separate and every[:4] != every[4:8]
    short = complete(
        captioner, features[:1], ["Tell."], sampling=replace(SAMPLED, max_new_tokens=3), num_samples=4, seeds=[7]
    )
    assert all(full.text.startswith(cut.text[:-1]) for full, cut in zip(every, short, strict=False))
    smaller_batches = complete(
        captioner, features, ["Tell."] * 3, sampling=SAMPLED, num_samples=4, seeds=[7, 8, 9], limits=BatchLimits(4)
    )
    assert smaller_batches == every


def test_log_probabilities_by_hand():
    """Logits of 0.1, 0.5 and 0.4 times e: the softmax is these numbers."""
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(2, 3) + 1
    tokens = torch.tensor([0, 2])
    first, second = to_sampled_tokens(tokens, *compute_logprobs(tokens, logits.double(), num_top=2))
    assert (first.id, second.id) == (0, 2)
    assert (first.logprob, second.logprob) == pytest.approx((math.log(0.1), math.log(0.4)))
    assert [token for token, _ in first.top] == [1, 2]
    assert [logprob for _, logprob in first.top] == pytest.approx([math.log(0.5), math.log(0.4)])
    assert to_sampled_tokens(tokens, *compute_logprobs(tokens, logits, num_top=0))[0].top == ()


@torch.no_grad()
@pytest.mark.parametrize("model", ["shipped", "plus"])
def test_log_probabilities_equal_those_of_the_training_pass(request, videos, model):
    """Temperature, nucleus and repetition penalty change the samples, and not the probabilities.

    The shipped model in place of the random one, whose large weights amplify rounding errors.
    """
    captioner = Captioner.load(SHIPPED_MODEL) if model == "shipped" else request.getfixturevalue(model)
    network, processor = captioner.network, captioner.processor
    media = [processor.read(video) for video in videos[:2]]
    prompts = [PromptRow(0, "Tell."), PromptRow(1, "Tell me more of it.")]
    sampling = Sampling(temperature=1.5, top_p=0.9, max_new_tokens=12, repetition_penalty=1.3, logprobs=3)
    inputs = processor.collate(prompts, media)
    rows = generate(network, inputs, sampling=sampling, stop_ids=[2], num_samples=2, seeds=[1, 2])
    for number, row in enumerate(rows):
        prompt = processor.collate([replace(prompts[number // 2], clip=0)], [media[number // 2]])
        answer = torch.tensor([[token.id for token in row]])
        positions = prompt.position_ids[..., -1:] + 1 + torch.arange(len(row))
        whole = replace(
            prompt,
            input_ids=torch.cat([prompt.input_ids, answer], 1),
            attention_mask=torch.ones(1, prompt.input_ids.shape[1] + len(row), dtype=torch.long),
            position_ids=torch.cat([prompt.position_ids, positions], -1),
            labels=torch.cat([torch.full_like(prompt.input_ids, -100), answer], 1),
        )
        (expected,) = network(whole)
        expected = expected[-len(row) :].tolist()
        assert [token.logprob for token in row] == pytest.approx(expected, abs=1e-4)
        for token in row:
            assert (
                len(token.top) == 3 and token.top[0][1] >= token.top[2][1] and token.top[0][1] >= token.logprob - 1e-6
            )


def test_nan_logits_do_not_affect_other_rows():
    """NaN logits have no nucleus; in one row they must not affect the other rows."""
    logits = torch.tensor([[float("nan")] * 4, [0.0, 9.0, 0.0, 0.0]])
    tokens = sample_tokens(logits, torch.tensor([0.5, 0.5]), sampling=Sampling(temperature=1.0, top_p=0.5))
    assert 0 <= tokens[0] < 4 and tokens[1] == 1


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_chunked_prefill_equals_one_pass(request, videos, monkeypatch, model):
    """Three clips with two questions each: prefilled in one pass, two clips at a time, and one by one."""
    captioner = request.getfixturevalue(model)
    network, processor = captioner.network, captioner.processor
    media = [processor.read(video) for video in videos[:3]]
    inputs = processor.collate(
        [PromptRow(clip, prompt) for prompt in ("Tell.", "What is heard?") for clip in range(3)], media
    )
    two_clips = int(inputs.attention_mask[:2].sum()) + 30
    passes = []
    decode = network._run_decoder
    monkeypatch.setattr(network, "_run_decoder", lambda *args: passes.append(args[0].embeds.shape[:2]) or decode(*args))
    answers, num_prefills = [], []
    for chunk_tokens in (10**6, two_clips, 1):
        monkeypatch.setattr(network, "prefill_chunk_tokens", chunk_tokens)
        passes.clear()
        answers.append(generate(network, inputs, sampling=Sampling(max_new_tokens=8), stop_ids=[2]))
        num_prefills.append(len([shape for shape in passes if shape[0] == 1 and shape[1] > 6]))
    assert answers[0] == answers[1] == answers[2]
    assert num_prefills == [1, 2, 3]
