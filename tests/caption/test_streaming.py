"""Streaming, several samples and several questions: all equal what `caption` returns."""

from dataclasses import replace
from itertools import chain

import pytest

from salmonn.caption.generate import DecodeBatch, SampledToken
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.limits import BatchLimits
from salmonn.caption.loader import ClipReader
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import IncrementalDetokenizer
from salmonn.caption.segments import FixedSegments
from salmonn.caption.streaming import to_completion
from salmonn.model.layout import ClipInfo
from salmonn.records import Caption, Failure
from tests.completions import complete, generate

SHORT = Sampling(max_new_tokens=12)
SAMPLED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12)


@pytest.mark.parametrize("sampling", [SHORT, SAMPLED])
def test_streamed_text_is_the_caption(captioner, videos, sampling):
    for seed, video in enumerate(videos[:2]):
        deltas = list(captioner.stream(video, sampling=sampling, seed=seed))
        assert "".join(deltas) == captioner.caption(video, sampling=sampling, seed=seed).text
        assert len(deltas) > 3 and all(deltas[:-1])


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_added_requests_equal_those_in_one_batch(request, videos, model):
    """Three start; a fourth with other sampling is added after two tokens, a fifth when the first three have ended."""
    captioner = request.getfixturevalue(model)
    media = [captioner.processor.read(video) for video in videos[:4]]
    clips, prompts = media[:3], ["Tell.", "Tell me more.", "List the events."]
    long = Sampling(max_new_tokens=30, repetition_penalty=1.2)
    texts, completions = [""] * 5, [None] * 5
    generator = captioner.streaming_generator()
    assert list(generator.add(clips, prompts, sampling=SAMPLED, seeds=[4, 5, 6])) == [0, 1, 2]
    for step in range(100):
        if step == 2:
            assert list(generator.add(media[3:], ["Tell."], sampling=long, seeds=[7])) == [3]
        if step == 14:
            assert completions[0] and completions[1] and completions[2] and not completions[3]
            assert list(generator.add(media[:1], ["What is heard?"], sampling=SAMPLED, seeds=[8])) == [4]
        if not generator:
            break
        for number, delta in generator.step().items():
            assert completions[number] is None
            texts[number] += delta.text
            completions[number] = delta.completion
    expected = [
        *complete(captioner, clips, prompts, sampling=SAMPLED, seeds=[4, 5, 6]),
        *complete(captioner, media[3:], ["Tell."], sampling=long, seeds=[7]),
        *complete(captioner, media[:1], ["What is heard?"], sampling=SAMPLED, seeds=[8]),
    ]
    assert completions == expected and texts == [answer.text for answer in expected]
    assert len(set(texts)) == 5


def test_a_cancelled_row_ends_and_the_others_continue(captioner, media):
    inputs = captioner.processor.collate([PromptRow(number, "Tell.") for number in range(3)], media[:3])
    options = dict(sampling=Sampling(max_new_tokens=10), stop_ids=[999])  # not a token of this model
    expected = generate(captioner.network, inputs, **options)
    generation, tokens = DecodeBatch(captioner.network, stop_ids=options["stop_ids"]), [[], [], []]
    generation.add(inputs, sampling=options["sampling"])
    passes = []
    hook = captioner.network.lm.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    for number in range(1, 8):
        for row, token in generation.step({4: {1}, 7: {0, 2}}.get(number, set())).items():
            tokens[row].append(token)
    hook.remove()
    # A row cancelled after three tokens has three; with all rows cancelled nothing more is computed.
    assert tokens == [expected[0][:6], expected[1][:3], expected[2][:6]]
    assert len(passes) == 5 and not generation


def test_text_is_streamed_in_complete_characters_and_stripped(captioner):
    """A character of three bytes is three tokens; whitespace is held back until text follows."""
    tokenizer = captioner.processor.tokenizer
    text = " a € b  "
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    deltas = [stream.add(token) for token in ids]
    assert tokenizer.decode(ids) == text and "".join(deltas) == "a € b"
    assert not any("\ufffd" in delta for delta in deltas) and stream.finalize("a € b") == ""
    incomplete = IncrementalDetokenizer(tokenizer)
    streamed = "".join(incomplete.add(token) for token in tokenizer.encode("a €")[:-1])
    assert streamed == "a" and incomplete.finalize("a \ufffd") == " \ufffd"


def test_samples_read_a_video_once(captioner, videos):
    (captions,) = captioner.generate([CaptionRequest(videos[0], sampling=SAMPLED, seed=7, num_samples=3)])
    assert [caption.sample for caption in captions] == [0, 1, 2]
    assert captions[0] == captioner.caption(videos[0], sampling=SAMPLED, seed=7)
    assert len({caption.text for caption in captions}) == 3


def test_questions_read_a_video_once(captioner, videos, monkeypatch):
    reads = []
    read = captioner.processor.clip_inputs
    monkeypatch.setattr(captioner.processor, "clip_inputs", lambda clip: reads.append(clip.path) or read(clip))
    requests = [CaptionRequest(videos[0], prompt, SHORT, Span(1.0, 3.0)) for prompt in ("Tell.", "List the events.")]
    captions = [caption for (caption,) in captioner.generate(requests)]
    assert reads == [str(videos[0])]
    separate = [
        captioner.caption(videos[0], prompt=prompt, sampling=SHORT, span=Span(1.0, 3.0))
        for prompt in ("Tell.", "List the events.")
    ]
    assert captions == separate
    # Batches share a clip that was read, but not one with another span.
    reads.clear()
    assert captioner.generate([*requests, replace(requests[0], span=Span())], limits=BatchLimits(1))[:2] == [
        [caption] for caption in captions
    ]
    assert len(reads) == 2


def test_segments_are_captions_of_their_spans(captioner, videos, tmp_path):
    """Segments of 2 s; a broken file is a failed segment."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with ClipReader(workers=0) as reader:
        requests = [
            CaptionRequest(videos[0], sampling=SHORT, span=Span(None, 4.5)),
            CaptionRequest(broken, sampling=SHORT),
            CaptionRequest(videos[1], sampling=SHORT, span=Span(1.0, 4.5)),
        ]
        batches = list(captioner.caption_batches(requests, segments=FixedSegments(2.0), batch_size=2, reader=reader))
    assert all(len(batch) <= 2 for batch in batches)
    segments = {0: [], 1: [], 2: []}
    for segment in chain.from_iterable(batches):
        segments[segment.index].append(segment)
    (failure,) = segments[1]
    assert isinstance(failure.result, Failure) and failure.result.stage == "read" and failure.num_segments == 1
    # 3.5 s in steps of 2 s: the remaining 1.5 s are a separate segment.
    spans = [(segment.result.start_seconds, segment.result.end_seconds) for segment in segments[2]]
    assert sorted(spans) == [(1.0, 3.0), (3.0, 4.5)] and all(segment.num_segments == 2 for segment in segments[2])
    assert len(segments[0]) == segments[0][0].num_segments == 2
    for segment in segments[0] + segments[2]:
        assert isinstance(segment.result, Caption)
        span = Span(segment.result.start_seconds, segment.result.end_seconds)
        assert segment.result == captioner.caption(segment.result.video, sampling=SHORT, span=span)


def test_an_infinite_segment_is_the_whole_video_with_a_known_end(captioner, videos):
    (batch,) = captioner.caption_batches(
        [CaptionRequest(videos[0], sampling=SHORT)], segments=FixedSegments(float("inf"))
    )
    caption = batch[0].result
    assert caption.start_seconds == 0.0 and caption.end_seconds > 4
    assert caption.text == captioner.caption(videos[0], sampling=SHORT).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"prompt": "Tell <|im_end|>."}, "special token"),
        ({"prompt": "Tell " * 5000}, "the prompt has 25,000 characters; the maximum is 20,000"),
        ({"prompt": "Tell \ud800."}, "unpaired surrogate"),
    ],
)
def test_invalid_requests_fail_before_reading(captioner, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prompt = options.pop("prompt", None)
        next(captioner.caption_batches([CaptionRequest(tmp_path / "none.mp4", prompt)], **options))


def test_endless_requests(captioner, videos):
    """Requests are consumed a few batches at a time."""
    consumed = []

    def endless():
        while True:
            consumed.append(1)
            yield CaptionRequest(videos[0], sampling=replace(SHORT, max_new_tokens=1), span=Span(0.0, 1.0))

    batches = captioner.caption_batches(endless(), batch_size=1)
    assert [len(next(batches)) for _ in range(3)] == [1, 1, 1]
    batches.close()
    # Three are done, and two more batches were read ahead.
    assert len(consumed) == 5


def test_streamed_tokens_are_those_of_the_completion(captioner, media):
    """With log-probabilities, each token is in one delta; also those after which no text is added."""
    sampling = replace(SAMPLED, logprobs=2, stop=("no such text",))
    generator = captioner.streaming_generator()
    generator.add(media[:1], ["Tell."], sampling=sampling, seeds=[4])
    deltas = []
    while generator:
        deltas += generator.step().values()
    completion = deltas[-1].completion
    assert tuple(token for delta in deltas for token in delta.tokens) == completion.tokens
    assert all(token.logprob < 0 and len(token.top) == 2 for token in completion.tokens)
    assert len(completion.tokens) == 12 > len(deltas)


def test_captions_have_their_log_probability(captioner, videos):
    """The sum over the tokens of the same completion, streamed."""
    sampling = replace(SAMPLED, logprobs=0)
    (captions,) = captioner.generate([CaptionRequest(videos[0], sampling=sampling, seed=4, num_samples=2)])
    assert captions[0].num_tokens == 12 and captions[0].logprob != captions[1].logprob
    generator = captioner.streaming_generator()
    generator.add([captioner.processor.read(videos[0])], [captioner.default_prompt()], sampling=sampling, seeds=[4])
    tokens = [token for _ in range(12) for delta in generator.step().values() for token in delta.tokens]
    # The batches differ in size, so that the last digits of float32 differ; another token would be off by far more.
    assert captions[0].logprob == pytest.approx(sum(token.logprob for token in tokens), abs=1e-3)
    plain = captioner.caption(videos[0], sampling=SAMPLED, seed=4)
    assert (plain.text, plain.logprob, plain.num_tokens) == (captions[0].text, None, None)


@pytest.mark.parametrize(("stop", "expected"), [("\n", "A red circle."), (".\n", "A red circle"), (". \n", None)])
def test_stop_strings_that_end_in_white_space(captioner, stop, expected):
    """They are found although white space is dropped at the end of an answer."""
    processor, sampling = captioner.processor, Sampling(stop=(stop,))
    tokens = [SampledToken(token) for token in processor.tokenizer.encode(" A red circle.\n")]
    detokenizer = IncrementalDetokenizer(processor.tokenizer, stop=sampling.stop)
    streamed = "".join(detokenizer.add(token.id) for token in tokens)
    completion = to_completion(processor, tokens, ClipInfo(), sampling=sampling)
    assert (completion.text, completion.finished) == (expected or "A red circle.", expected is not None)
    assert streamed + detokenizer.finalize(completion.text) == completion.text
    assert detokenizer.is_stopped == completion.finished
