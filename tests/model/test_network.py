"""Log-probabilities and answers are independent of the rest of the batch, and equal those of transformers."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.generator import Sampling
from salmonn.caption.processor import PromptRow, select_modality
from tests.completions import complete, generate

ROWS = [
    PromptRow(0, "Tell.", "A red circle appears and then a low tone is heard."),
    PromptRow(1, "What can be seen?", "a star"),
    PromptRow(2, "What can be heard in this?", "beeps, then noise"),
    PromptRow(0, "Which?", "two"),  # a second question about the first clip
]


@pytest.fixture(scope="module")
def mixed(media, processor, videos):
    """Clips of different kinds and lengths: both, video only, audio only (of a shorter span)."""
    short = processor.read(videos[2], start_seconds=1.0, end_seconds=3.2)
    return [media[0], select_modality(media[1], "visual"), select_modality(short, "audio")]


@pytest.fixture(params=["captioner", "plus"])
def mixed_clips(request, videos):
    """A model of each family, and its inputs for clips of different kinds and lengths."""
    model = request.getfixturevalue(request.param)
    read = model.processor.read
    both, visual = read(videos[0]), read(videos[1], modality="visual")
    return model, [both, visual, read(videos[2], modality="audio", start_seconds=1.0, end_seconds=3.2)]


@torch.no_grad()
def test_a_batch_of_mixed_kinds_equals_separate_rows(mixed_clips):
    captioner, mixed = mixed_clips
    network, processor = captioner.network, captioner.processor
    batched = network(processor.collate(ROWS, mixed))
    num_answer_tokens = 0
    for number, row in enumerate(ROWS):
        separate = network(processor.collate([PromptRow(0, row.prompt, row.answer)], [mixed[row.clip]]))[0]
        width = len(separate)
        assert torch.allclose(batched[number, :width], separate, atol=1e-5, rtol=1e-5)
        assert batched[number, width:].eq(0).all()
        num_answer_tokens += int((separate != 0).sum())
    lengths = [len(processor.tokenizer.encode(row.answer)) + 1 for row in ROWS]  # with the stop token
    assert num_answer_tokens == sum(lengths) and batched.min() < -1


@torch.no_grad()
def test_log_probabilities_equal_those_of_transformers(mixed_clips):
    captioner, mixed = mixed_clips
    network = captioner.network
    inputs = captioner.processor.collate(ROWS, mixed)
    logits = network.lm(
        inputs_embeds=network.embed(inputs),
        attention_mask=inputs.attention_mask,
        position_ids=network.family.rotary_positions(inputs.position_ids),
    ).logits
    expected = torch.zeros(inputs.labels.shape[0], inputs.labels.shape[1] - 1)
    for row, labels in enumerate(inputs.labels.tolist()):
        for index, label in enumerate(labels):
            if label != -100:  # predicted by the previous token
                expected[row, index - 1] = logits[row, index - 1].log_softmax(-1)[label]
    assert torch.allclose(network(inputs), expected, atol=1e-5, rtol=1e-5)


def largest_error(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest feature: those of the random model reach 1,400, and small ones are sums of large ones."""
    return ((tokens - expected).abs().max() / expected.abs().max()).item()


def test_batched_greedy_answers_equal_separate_ones(captioner, mixed):
    sampling = Sampling(max_new_tokens=12)
    clips = [*mixed, mixed[0]]
    prompts = ["Tell.", "What can be seen in the whole of this?", "?", "Which?"]
    batched = complete(captioner, clips, prompts, sampling=sampling)
    separate = [
        complete(captioner, [clip], [prompt], sampling=sampling)[0] for clip, prompt in zip(clips, prompts, strict=True)
    ]
    assert batched == separate
    assert len({answer.text for answer in batched}) > 2  # the answers do depend on clip and prompt


@torch.no_grad()
def test_features_give_the_same_as_clip_inputs(captioner, mixed):
    network, processor = captioner.network, captioner.processor
    features = captioner.encode(mixed)
    assert [len(clip_features) for clip_features in features] == [len(processor.make_layout(clip)) for clip in mixed]
    assert torch.equal(network(processor.collate(ROWS, features)), network(processor.collate(ROWS, mixed)))
    options = dict(sampling=Sampling(max_new_tokens=8), stop_ids=[2])
    questions = [PromptRow(row.clip, row.prompt) for row in ROWS]
    assert generate(network, processor.collate(questions, features), **options) == generate(
        network, processor.collate(questions, mixed), **options
    )


@torch.no_grad()
def test_encoding_in_batches_changes_nothing(captioner, mixed):
    num_done = []
    one_by_one = captioner.encode(mixed, batch_size=1, on_progress=num_done.append)
    assert num_done == [1, 1, 1]
    for clip_features, separate in zip(captioner.encode(mixed), one_by_one, strict=True):
        assert largest_error(clip_features.tokens, separate.tokens) < 1e-5


@torch.no_grad()
def test_tokens_are_in_temporal_order(captioner, media):
    """8 s are 16 frames and 16 windows of audio: frame, window, frame, window, ..."""
    network, clip = captioner.network, media[0]
    (visual,), (audio,) = network.vision([clip.pixels], [clip.grid]), network.audio([clip.mel])
    (tokens,) = network.encode([clip], [captioner.processor.make_layout(clip)])
    assert clip.num_frames == 16 and len(visual) == 16 * 12 and len(audio) == 16
    by_frame = torch.cat([visual.unflatten(0, (16, 12)), audio[:, None]], dim=1)
    assert torch.allclose(tokens, by_frame.flatten(0, 1), atol=1e-5)


@torch.no_grad()
def test_tokens_of_2_plus_are_in_temporal_order(plus, videos):
    """Steps of a little more than half a second among windows of half a second: step, window, step, window, ..."""
    network, clip = plus.network, plus.processor.read(videos[0])
    (visual,), (audio,) = network.vision([clip.pixels], [clip.grid]), network.audio([clip.mel])
    (tokens,) = network.encode([clip], [plus.processor.make_layout(clip)])
    for step in range(3):  # later steps may start a window later
        assert torch.allclose(tokens[5 * step : 5 * step + 4], visual[4 * step : 4 * step + 4], atol=1e-5)
        assert torch.allclose(tokens[5 * step + 4], audio[step], atol=1e-5)
    assert len(tokens) == len(visual) + len(audio)


@torch.no_grad()
def test_long_audio_is_encoded_in_chunks(captioner, media):
    """Two chunks of 16 windows; the chunk of the next clip is separate."""
    network = captioner.network
    long = replace(select_modality(media[0], "audio"), mel=torch.cat([media[0].mel, media[1].mel]))
    after = select_modality(media[2], "audio")
    first, second = captioner.encode([long, after])
    (windows,) = network.audio([long.mel])
    assert len(first) == 32 and largest_error(first.tokens, windows) < 1e-5
    assert largest_error(second.tokens, captioner.encode([after])[0].tokens) < 1e-5


@torch.no_grad()
def test_a_wrong_number_of_placeholders_is_rejected(captioner, media):
    inputs = captioner.processor.collate([PromptRow(0, "Tell.", "x")], [media[0]])
    ids = inputs.input_ids.clone()
    position = (ids[0] == captioner.network.config.placeholder_ids[0]).nonzero()[0]
    ids[0, position] = 7
    count = len(captioner.processor.make_layout(media[0]))
    with pytest.raises(ValueError, match=f"{count - 1} placeholders.*{count} tokens"):
        captioner.network(type(inputs)(**{**vars(inputs), "input_ids": ids}))


def test_gradients_do_not_depend_on_the_order_of_threads(captioner, media):
    """Rows about one clip share the last token of their prefix, whose gradients are added in a fixed order."""
    network = captioner.network
    rows = [PromptRow(0, "Tell.", f"{number} red stars appear and a tone is heard") for number in range(64)]
    inputs = captioner.processor.collate(rows, captioner.encode(media[:1]))
    network.requires_grad_(False)
    decoder = network.lm.get_decoder()
    decoder.layers = decoder.layers[:1]  # rows are gathered after the layers
    weight = decoder.norm.weight.requires_grad_(True)
    torch.set_num_threads(2)
    try:
        sums = set()
        for _ in range(4):
            weight.grad = None
            network(inputs).sum().backward()
            sums.add(weight.grad.double().sum().item())
    finally:
        torch.set_num_threads(1)
    assert len(sums) == 1


def test_logits_are_computed_in_chunks(captioner, media):
    """Chunks of seven positions equal a single pass, forward and backward, with at most seven positions in memory."""
    network = captioner.network
    inputs = captioner.processor.collate(ROWS, captioner.encode(media[:3]))
    network.requires_grad_(False)
    weight = network.lm.get_decoder().norm.weight.requires_grad_(True)
    sizes = []
    network.lm.get_output_embeddings().register_forward_hook(lambda _, args, output: sizes.append(len(output)))

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        weight.grad = None
        logps = network(inputs)
        (logps.sum(1) * torch.tensor([1.0, -1.0, 2.0, 0.5])).sum().backward()
        return logps.detach(), weight.grad

    one_pass, gradient = value_and_gradient()
    count = int((one_pass != 0).sum())
    assert sizes == [count] and count > 21
    vocabulary = captioner.processor.config.lm["vocab_size"]
    network.max_logit_bytes = 7 * 4 * vocabulary
    sizes.clear()
    chunked, chunked_gradient = value_and_gradient()
    # Once forward and once more for the gradient.
    assert sorted(sizes) == sorted(2 * ([7] * (count // 7) + [count % 7]))
    assert torch.allclose(chunked, one_pass, atol=1e-5)
    assert torch.allclose(chunked_gradient, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())
