"""The common prefix of a clip's rows is computed once, and results do not change."""

import torch

from salmonn.caption.processor import PromptRow, select_modality
from salmonn.model.packing import PrefixGroup, pack

# Clip 0: rows 0 and 2 have the prefix 7 7 1; clip 1: one row; padded with 0.
IDS = torch.tensor([[7, 7, 1, 2, 3], [8, 8, 1, 0, 0], [7, 7, 1, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_layout():
    packed = pack(IDS, MASK, (0, 1, 0))
    tokens = IDS.flatten()[packed.source]
    assert tokens.tolist() == [7, 7, 1, 2, 3, 4, 8, 8, 1]
    assert packed.groups == (PrefixGroup(0, (0, 2), 3, (2, 1)), PrefixGroup(1, (1,), 3, (0,)))
    assert packed.segment_lengths == [3, 2, 1, 3, 0] and packed.row_order == [0, 2, 1]
    # The second row's tokens are 7 to 9, the third's its shared three and the sixth.
    assert packed.destination.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 0, 0], [0, 1, 2, 5, 0]]
    assert torch.equal(tokens[packed.destination][MASK.bool()], IDS[MASK.bool()])


def test_a_minimum_suffix():
    """For decoding, each row has a suffix of at least one token, also if rows are equal or there is only one."""
    packed = pack(IDS[[1, 1, 0]], MASK[[1, 1, 0]], (4, 4, 5), min_suffix=1)
    assert packed.groups == (PrefixGroup(4, (0, 1), 2, (1, 1)), PrefixGroup(5, (2,), 4, (1,)))
    assert IDS[[1, 1, 0]].flatten()[packed.source].tolist() == [8, 8, 1, 1, 7, 7, 1, 2, 3]
    same = pack(IDS[[1, 1]], MASK[[1, 1]], (4, 4))  # otherwise two equal rows are all prefix
    assert same.source.tolist() == [0, 1, 2] and same.groups == (PrefixGroup(4, (0, 1), 3, (0, 0)),)


def test_chunks_are_complete_groups():
    """Group 0 has 6 tokens (prefix 3, suffixes 2 + 1), group 1 has 3 (prefix 2, suffix 1): 9 in all."""
    packed = pack(IDS, MASK, (0, 1, 0), min_suffix=1)
    assert [group.num_tokens for group in packed.groups] == [6, 3]
    for max_tokens, expected in [(9, [[0, 1]]), (8, [[0], [1]]), (1, [[0], [1]])]:
        chunks = list(packed.chunks(max_tokens))
        assert [[group.clip for group in chunk.groups] for chunk in chunks] == expected
        assert torch.equal(torch.cat([chunk.source for chunk in chunks]), packed.source)
    first, second = packed.chunks(1)
    # Rows 0 and 2 end at 4 and 5 of the first chunk, row 1 at 2 of the second; at 4, 5, 8 of the whole sequence.
    assert [batch.row_ends.tolist() for batch in (first, second, packed)] == [[4, 5], [2], [4, 5, 8]]
    assert second.destination[1, :3].tolist() == [0, 1, 2]


def test_gradients_equal_those_of_separate_rows(captioner, media):
    network, processor = captioner.network, captioner.processor
    for parameter in network.parameters():
        parameter.data.div_(6)  # with the large random weights, rounding errors would dominate
    rows = [
        PromptRow(0, "Tell.", "a red circle appears and blinks"),
        PromptRow(1, "Tell.", "beeps"),
        PromptRow(0, "Tell.", "a red star"),
        PromptRow(0, "What can be heard?", "a low tone"),
        *(PromptRow(clip, "Tell.", "a blue star moves") for clip in range(2, len(media))),
    ]
    weights = torch.tensor([1.0, 2.0, -0.5, 3.0, 1.0, -1.0, 2.0])  # as DPO weighs chosen against rejected

    def gradients(losses):
        network.zero_grad()
        for loss in losses():
            loss.backward()
        return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}

    media = [*media[:2], *(select_modality(clip, "audio") for clip in media[2:])]
    inputs = processor.collate(rows, media)
    packed = gradients(lambda: [(network(inputs).sum(1) * weights).sum()])
    separate = gradients(
        lambda: (
            network(processor.collate([PromptRow(0, row.prompt, row.answer)], [media[row.clip]])).sum() * weight
            for row, weight in zip(rows, weights, strict=True)
        )
    )
    assert packed.keys() == separate.keys()
    largest = max(value.abs().max() for value in separate.values())
    assert largest > 1e-2
    for name in separate:
        assert (packed[name] - separate[name]).abs().max() < 1e-5 * largest, name


def test_the_decoder_processes_a_clip_once(captioner, media):
    network, processor = captioner.network, captioner.processor
    shapes = []
    network.lm.get_decoder().layers[0].mlp.register_forward_hook(
        lambda _, args, output: shapes.append(output.shape[:2])
    )
    rows = [PromptRow(0, "Tell.", text) for text in ("a red circle", "a blue star", "a low tone is heard")]
    inputs = processor.collate(rows, media[:1])
    network(inputs)
    clip_tokens = len(processor.make_layout(media[0]))
    assert shapes[0][0] == 1 and clip_tokens < shapes[0][1] < clip_tokens + 60
    assert inputs.input_ids.numel() > 3 * clip_tokens
