"""Order of time and places in the text, on literal tensors."""

import pytest
import torch

from salmonn.model.splice import interleave, place, time_order


def test_time_order_by_hand():
    # Frames at 0.25, 0.75, 1.6; windows begin at 0, 0.5, 1.0, 1.5: w0 f0 w1 f1 w2 w3 f2, windows numbered from 3.
    order = time_order(torch.tensor([0.25, 0.75, 1.6]), num_windows=4, window_seconds=0.5)
    assert order.tolist() == [3, 0, 4, 1, 5, 6, 2]


def test_a_frame_comes_before_a_window_of_the_same_time():
    order = time_order(torch.tensor([0.0, 0.5, 1.0]), num_windows=3, window_seconds=0.5)
    assert order.tolist() == [0, 3, 1, 4, 2, 5]


def test_one_kind_alone():
    assert time_order(torch.tensor([0.25, 0.75]), num_windows=0, window_seconds=0.5).tolist() == [0, 1]
    assert time_order(torch.zeros(0), num_windows=3, window_seconds=0.5).tolist() == [0, 1, 2]


def test_interleave():
    frames = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]])  # 2 frames of 2 tokens
    windows = torch.tensor([[[7.0, 7.0]], [[8.0, 8.0]], [[9.0, 9.0]]])  # 3 windows of 1 token
    tokens = interleave(frames, windows, torch.tensor([2, 0, 3, 4, 1]))
    assert tokens[:, 0].tolist() == tokens[:, 1].tolist() == [7, 1, 2, 8, 9, 3, 4]


def test_interleave_refuses_another_count():
    with pytest.raises(ValueError, match="2 frames and 1 windows do not match an order of 4"):
        interleave(torch.zeros(2, 1, 3), torch.zeros(1, 1, 3), torch.arange(4))


def test_place_fills_row_by_row():
    embeds = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    tokens = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    placed = place(embeds, mask, tokens)
    assert placed.tolist() == [[[0, 1], [-1, -2], [-3, -4]], [[-5, -6], [8, 9], [10, 11]]]
    assert embeds[0, 1].tolist() == [2, 3]  # the text's own embeddings stay as they were


def test_place_lets_gradients_through():
    tokens = torch.ones(1, 2, requires_grad=True)
    place(torch.zeros(1, 2, 2), torch.tensor([[False, True]]), tokens).sum().backward()
    assert tokens.grad.tolist() == [[1, 1]]


@pytest.mark.parametrize("count", [1, 3])
def test_place_names_both_counts(count):
    with pytest.raises(ValueError, match=rf"2 placeholders.*{count} tokens"):
        place(torch.zeros(1, 3, 4), torch.tensor([[True, True, False]]), torch.zeros(count, 4))
