"""States of requests: what they are, and that they depend on the text alone."""

from dataclasses import replace

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import prompt_ids
from salmonn.preference.states import answer_states, request_states

ROWS = [
    PromptRow(0, "Tell.", "A red circle blinks."),
    PromptRow(1, "What can be seen?", "a star", finished=False),
    PromptRow(1, "Tell.", "A low tone."),
]


@pytest.mark.parametrize("name", ["captioner", "plus"])
@torch.no_grad()
def test_the_state_of_a_request_is_the_mean_of_its_text(request, name):
    """The mean of the decoder's output over the chat with an empty clip, computed by transformers alone."""
    captioner = request.getfixturevalue(name)
    network, processor = captioner.network, captioner.processor
    chat = prompt_ids(processor.tokenizer, ROWS[1].prompt, placeholders=(), family=processor.family, system="")
    ids = torch.tensor([chat])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    output = network.lm.get_decoder()(
        inputs_embeds=network.lm.get_input_embeddings()(ids), position_ids=network.family.rotary_positions(positions)
    )
    expected = output.last_hidden_state.mean(1)
    assert torch.allclose(request_states(captioner, ROWS[1:2]), expected, atol=1e-4, rtol=1e-4)


def test_the_state_of_a_request_depends_on_its_text_alone(captioner, media):
    states = answer_states(captioner, ROWS, media, pooling="mean")
    assert states.request is not None and states.request.shape == states.prompt.shape
    assert torch.equal(states.request[0], states.request[2])  # of another clip, with another answer
    assert not torch.allclose(states.request[0], states.request[1], atol=1e-2)
    assert not torch.allclose(states.prompt[0], states.prompt[2], atol=1e-2)
    later = replace(ROWS[0], history=(("What can be seen?", "a star"),))  # what was asked before is part of the text
    assert not torch.allclose(request_states(captioner, [later])[0], states.request[0], atol=1e-2)
