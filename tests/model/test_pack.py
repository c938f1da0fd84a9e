"""What rows about one clip begin with alike goes through the decoder once, and nothing else changes."""

import torch

from salmonn.caption.inputs import Row, restrict_media
from salmonn.model.pack import pack

# Clip 0: rows 0 and 2 begin alike (7 7 1), then part; clip 1: one row; padded with 0.
IDS = torch.tensor([[7, 7, 1, 2, 3], [8, 8, 1, 0, 0], [7, 7, 1, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_layout():
    packed = pack(IDS, MASK, (0, 1, 0))
    tokens = IDS.flatten()[packed.source]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, -1, -1, -1]]
    assert tokens[0].tolist() == [7, 7, 1, 2, 3, 4] and tokens[1, :3].tolist() == [8, 8, 1]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.clips == (0, 1)
    assert torch.equal(tokens.flatten()[packed.places][MASK.bool()], IDS[MASK.bool()])


def test_a_row_sees_the_beginning_and_itself():
    mask = pack(IDS, MASK, (0, 1, 0)).mask
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # the second row's token, blind to the first row's
    ]


def test_short_layouts_share_a_sequence():
    ids = torch.tensor([[7, 7, 1, 2, 3], [8, 8, 1, 0, 0], [9, 1, 0, 0, 0], [5, 6, 1, 2, 0], [7, 7, 1, 4, 0]])
    lengths = torch.tensor([5, 3, 2, 4, 4])
    mask = (torch.arange(5) < lengths[:, None]).long()
    packed = pack(ids, mask, (0, 3, 1, 2, 0))  # 6 tokens of clip 0, 4 of clip 2, 3 of clip 3, 2 of clip 1
    assert packed.source.shape == (3, 6)
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 2, 2], [0, 0, 0, -1, -1, -1]]
    assert packed.beginnings.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2, 2], [0, 0, 0, -1, -1, -1]]
    assert packed.positions[1].tolist() == [0, 1, 2, 3, 0, 1]
    assert packed.clips == (0, 2, 1, 3)
    assert torch.equal(ids.flatten()[packed.source].flatten()[packed.places][mask.bool()], ids[mask.bool()])
    assert packed.mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],  # another clip, blind to the first
        [0, 0, 0, 0, 1, 1],
    ]


def test_one_row_a_clip_needs_no_mask():
    assert pack(IDS, MASK, (0, 1, 2)).mask is None
    same = pack(IDS[[1, 1]], MASK[[1, 1]], (4, 4))  # twice the same row is all beginning
    assert same.mask is None and same.source.tolist() == [[0, 1, 2]] and same.clips == (4,)


def test_gradients_are_those_of_the_rows_alone(captioner, media):
    network, processor = captioner.network, captioner.processor
    for parameter in network.parameters():
        parameter.data.div_(6)  # the large random weights would drown the comparison in rounding
    rows = [
        Row(0, "Tell.", "a red circle appears and blinks"),
        Row(1, "Tell.", "beeps"),
        Row(0, "Tell.", "a red star"),
        Row(0, "What can be heard?", "a low tone"),
        *(Row(clip, "Tell.", "a blue star moves") for clip in range(2, len(media))),
    ]
    weights = torch.tensor([1.0, 2.0, -0.5, 3.0, 1.0, -1.0, 2.0])  # as DPO weighs chosen against rejected

    def gradients(losses):
        network.zero_grad()
        for loss in losses():
            loss.backward()
        return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}

    media = [*media[:2], *(restrict_media(clip, "audio") for clip in media[2:])]
    inputs = processor.inputs(rows, media)
    packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index)
    assert len(packed.source) < len(media)  # some clips share a sequence
    together = gradients(lambda: [(network(inputs).sum(1) * weights).sum()])
    alone = gradients(
        lambda: (
            network(processor.inputs([Row(0, row.prompt, row.answer)], [media[row.clip]])).sum() * weight
            for row, weight in zip(rows, weights, strict=True)
        )
    )
    assert together.keys() == alone.keys()
    largest = max(value.abs().max() for value in alone.values())
    assert largest > 1e-2
    for name in alone:
        assert (together[name] - alone[name]).abs().max() < 1e-5 * largest, name


def test_a_clip_goes_through_the_decoder_once(captioner, media):
    network, processor = captioner.network, captioner.processor
    seen = []
    network.lm.get_decoder().layers[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output.shape[:2]))
    rows = [Row(0, "Tell.", text) for text in ("a red circle", "a blue star", "a low tone is heard")]
    inputs = processor.inputs(rows, media[:1])
    network(inputs)
    clip_tokens = len(processor.lay_out(media[0]))
    assert seen[0][0] == 1 and clip_tokens < seen[0][1] < clip_tokens + 60
    assert inputs.input_ids.numel() > 3 * clip_tokens
