"""Layouts of both families and positions in the text, on literal numbers."""

import pytest
import torch

from salmonn.model.families.salmonn2 import interleave_by_frame
from salmonn.model.families.salmonn2_plus import interleave_by_time
from salmonn.model.layout import Layout, insert_clip_tokens, text_positions


def test_interleave_by_frame_by_hand():
    # Two frames of two tokens (0 1, 2 3), five audio tokens (4 ... 8), three of them during the video: these are
    # stretched to four (4 4 5 6, the nearest) and distributed two by two; 7 and 8 follow.
    layout = interleave_by_frame(2, 2, num_audio=5, num_during_video=3)
    assert layout.order.tolist() == [0, 1, 4, 4, 2, 3, 5, 6, 7, 8]
    assert layout.positions.tolist() == [list(range(10))] * 3
    assert layout.is_visual.tolist() == [True, True, False, False, True, True, False, False, False, False]
    assert layout.next_position == 10 and layout.timestamp_ids == ()


def test_audio_that_divides_evenly_is_not_stretched():
    assert interleave_by_frame(2, 1, num_audio=4, num_during_video=100).order.tolist() == [0, 2, 3, 1, 4, 5]


def test_timestamps_follow_their_frames():
    # Three frames of one token; their timestamps have 2, 1 and 2 tokens (3 4, 5, 6 7); 8 is the index of zeros.
    layout = interleave_by_frame(3, 1, num_audio=0, num_during_video=0, timestamp_ids=[(21, 22), (23,), (24, 25)])
    assert layout.order.tolist() == [0, 3, 4, 1, 5, 8, 2, 6, 7]
    assert layout.timestamp_ids == (21, 22, 23, 24, 25)


def test_interleave_by_frame_without_video():
    assert interleave_by_frame(0, 2, num_audio=3, num_during_video=9).order.tolist() == [0, 1, 2]


def test_interleave_by_time_by_hand():
    # Three steps of 1 x 2 tokens, 0.75 s each: they start at 0, 1.5 and 3 half seconds, floored 0, 1, 3. Step 0 is
    # followed by one audio token (6), step 1 by two (7 8), the last by the others (9 10).
    layout = interleave_by_time((3, 1, 2), num_audio=5, second_per_grid=0.75)
    assert layout.order.tolist() == [0, 1, 6, 2, 3, 7, 8, 4, 5, 9, 10]
    time, row, column = layout.positions.tolist()
    assert time == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4]
    assert row == [0] * 11
    assert column == [0, 1, 0, 0, 1, 1, 2, 0, 1, 3, 4]
    assert layout.next_position == 5 and int(layout.is_visual.sum()) == 6


def test_rows_and_columns():
    layout = interleave_by_time((1, 2, 3), num_audio=0, second_per_grid=1.0)
    assert layout.positions.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("num_audio", [0, 1, 2, 3])
def test_audio_shorter_than_the_video(num_audio):
    layout = interleave_by_time((4, 1, 1), num_audio=num_audio, second_per_grid=1.0)
    assert sorted(layout.order.tolist()) == list(range(4 + num_audio))
    assert layout.order[layout.is_visual].tolist() == [0, 1, 2, 3]


def test_interleave_by_time_without_video():
    layout = interleave_by_time(None, num_audio=3, second_per_grid=0.0)
    assert layout.order.tolist() == [0, 1, 2] and layout.positions.tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]


def test_positions_in_the_text():
    layout = interleave_by_time((2, 1, 2), num_audio=0, second_per_grid=1.0)  # times 0 0 2 2
    is_clip = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    time, row, column = text_positions(is_clip, mask, [layout, layout]).tolist()
    assert time == [[0, 1, 2, 2, 4, 4, 5, 0], [0, 0, 0, 1, 1, 3, 3, 4]]
    assert row == [[0, 1, 2, 2, 2, 2, 5, 0], [0, 0, 0, 1, 1, 1, 1, 4]]
    assert column == [[0, 1, 2, 3, 2, 3, 5, 0], [0, 0, 0, 1, 2, 1, 2, 4]]


def test_text_without_a_clip_counts_up():
    no_tokens = Layout(torch.zeros(0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.long), 0)
    mask = torch.tensor([[0, 1, 1]])
    assert text_positions(torch.zeros(1, 3).bool(), mask, [no_tokens]).tolist() == [[[0, 0, 1]]] * 3


def test_positions_name_both_counts():
    layout = interleave_by_time((1, 1, 2), num_audio=0, second_per_grid=1.0)
    with pytest.raises(ValueError, match="1 placeholders, but the clip has 2 tokens"):
        text_positions(torch.tensor([[True, False]]), torch.ones(1, 2), [layout])


def test_insert_clip_tokens_fills_row_by_row():
    embeds = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    tokens = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    inserted = insert_clip_tokens(embeds, mask, tokens)
    assert inserted.tolist() == [[[0, 1], [-1, -2], [-3, -4]], [[-5, -6], [8, 9], [10, 11]]]
    assert embeds[0, 1].tolist() == [2, 3]  # the text's own embeddings are unchanged


def test_insert_clip_tokens_propagates_gradients():
    tokens = torch.ones(1, 2, requires_grad=True)
    insert_clip_tokens(torch.zeros(1, 2, 2), torch.tensor([[False, True]]), tokens).sum().backward()
    assert tokens.grad.tolist() == [[1, 1]]


@pytest.mark.parametrize("count", [1, 3])
def test_insert_clip_tokens_names_both_counts(count):
    with pytest.raises(ValueError, match=rf"2 placeholders.*{count} tokens"):
        insert_clip_tokens(torch.zeros(1, 3, 4), torch.tensor([[True, True, False]]), torch.zeros(count, 4))


@pytest.mark.parametrize("seconds", [46, 54, 69, 92, 108])
def test_audio_is_stretched_with_the_published_rounding(seconds):
    """The published code interpolates in float32, which rounds some indices differently from float64."""
    num_audio = -(-seconds // 30) * 60
    layout = interleave_by_frame(seconds, 1, num_audio=num_audio, num_during_video=seconds * 50)
    per_frame = -(-num_audio // seconds)
    indices = torch.arange(num_audio, dtype=torch.float32)[None, None]
    published = torch.nn.functional.interpolate(indices, size=per_frame * seconds, mode="nearest")[0, 0].long()
    ours = layout.order.reshape(seconds, 1 + per_frame)[:, 1:] - seconds
    assert torch.equal(ours.flatten(), published)
