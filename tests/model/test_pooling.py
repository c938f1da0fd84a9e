"""Pooled states of answers: their definition, and that neither packing nor batching changes them."""

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.model.pooling import pool_last, pool_mean, pool_rich, pooled_width

ROWS = [
    PromptRow(0, "Tell.", "A red circle appears and then a low tone is heard."),
    PromptRow(0, "Tell.", "A red circle blinks."),  # shares the prompt and four words with the first
    PromptRow(1, "What can be seen?", "a star", finished=False),
    PromptRow(0, "Tell.", "A red circle blinks."),
]


def test_pools_by_hand():
    """Two answers, of one and of three tokens, in a decoder of width 2."""
    states = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0], [6.0, 0.0]])
    assert pool_last(states, (1, 3)).tolist() == [[1, 2], [6, 0]]
    assert pool_mean(states, (1, 3)).tolist() == [[1, 2], [3, 0]]
    logps, entropies = torch.tensor([-1.0, -3.0, -0.5, -2.5]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    rich = pool_rich(states, [10 * states], logps, entropies, lengths=(1, 3))
    layer_mean, mean, total, largest = [30, 0], [3, 0], [9 / 30, 0], [6, 1]
    figures = [-6.0, -2.0, -3.0, 2.0, 3, 2]  # sum, mean, minimum, mean entropy, tokens, those below -2
    assert rich[1].tolist() == pytest.approx(layer_mean + mean + total + largest + figures)
    assert rich.shape[1] == pooled_width("rich", width=2, num_layers=3) == 14
    assert pooled_width("last", width=2, num_layers=3) == pooled_width("mean", width=2, num_layers=3) == 2


@pytest.mark.parametrize(
    ("name", "pooling"), [("captioner", "last"), ("captioner", "mean"), ("captioner", "rich"), ("plus", "rich")]
)
@torch.no_grad()
def test_packed_rows_have_the_states_of_rows_alone(request, videos, pooling, name):
    captioner = request.getfixturevalue(name)
    network, processor = captioner.network, captioner.processor
    clips = [processor.read(video) for video in videos[:2]]
    packed = network(processor.collate(ROWS, clips), pooling=pooling)
    for number, row in enumerate(ROWS):
        alone = network(
            processor.collate([PromptRow(0, row.prompt, row.answer, finished=row.finished)], [clips[row.clip]]),
            pooling=pooling,
        )
        for one, other in ((packed.prompt[number], alone.prompt[0]), (packed.answer[number], alone.answer[0])):
            # Layers of a random decoder add up numbers of up to 1,500: what remains is rounded as those are.
            assert torch.allclose(one, other, atol=max(1e-4, 1e-6 * float(other.abs().max())), rtol=1e-4)
    assert torch.equal(packed.prompt[0], packed.prompt[1])  # the same clip and prompt
    assert not torch.allclose(packed.prompt[0], packed.prompt[2])
    assert torch.allclose(packed.answer[1], packed.answer[3], atol=1e-5)
    assert not torch.allclose(packed.answer[0], packed.answer[1], atol=1e-2)


@torch.no_grad()
def test_states_are_those_of_transformers(captioner, media):
    """The states lie where the tokens are in the unpacked row, and the log-probabilities are the captioner's."""
    network, inputs = captioner.network, captioner.processor.collate(ROWS[:1], media[:1])
    hidden = network.lm.get_decoder()(
        inputs_embeds=network.embed(inputs),
        attention_mask=inputs.attention_mask,
        position_ids=network.family.rotary_positions(inputs.position_ids),
        output_hidden_states=True,
    )
    answer = (inputs.labels[0] != -100).nonzero().flatten()
    output, layers = hidden.last_hidden_state[0], hidden.hidden_states
    states = network(inputs, pooling="last")
    assert torch.allclose(states.answer[0], output[answer[-1]], atol=1e-4, rtol=1e-4)
    assert torch.allclose(states.prompt[0], output[answer[0] - 1], atol=1e-4, rtol=1e-4)
    rich, width = network(inputs, pooling="rich").answer[0], output.shape[1]
    for place, layer in enumerate((layers[4], layers[5], output)):  # of six layers, the fourth, the fifth and the last
        mean = layer.reshape(-1, width)[answer].mean(0)
        assert torch.allclose(rich[place * width : (place + 1) * width], mean, atol=1e-4, rtol=1e-4)
    logps = network(inputs)[0]
    assert rich[-6].item() == pytest.approx(logps.sum().item(), rel=1e-4)
    assert rich[-2].item() == len(answer) == (logps != 0).sum()


def test_a_row_without_an_answer_is_refused(captioner, media):
    inputs = captioner.processor.collate([PromptRow(0, "Tell.", "", finished=False)], media[:1])
    with pytest.raises(ValueError, match="has no answer"):
        captioner.network(inputs, pooling="last")
