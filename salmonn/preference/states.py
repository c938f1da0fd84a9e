"""States of captions and of the requests that they answer, as the heads of reward models read them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.model.layout import ClipFeatures, ClipInputs, no_clip
from salmonn.model.pooling import AnswerStates, Pooling
from salmonn.preference.claims import pool_clauses
from salmonn.preference.comparisons import AnswerGroup

Clip = ClipInputs | ClipFeatures
MAX_ROWS = 64  # captions of a clip in one forward pass


def answer_rows(group: AnswerGroup, *, clip: int = 0, prompt: str | None = None) -> list[PromptRow]:
    """Return a row for each answer of a group; an empty one that was cut off counts as finished: it needs a token.

    Args:
        group: answers.
        clip: index of the clip that they are about.
        prompt: prompt instead of the group's, which may be empty.
    """
    one = group.example
    return [
        PromptRow(clip, one.prompt if prompt is None else prompt, text, one.history, finished=finished or not text)
        for text, finished in group.answers
    ]


@torch.no_grad()
def answer_states(
    captioner: Captioner,
    rows: Sequence[PromptRow],
    clips: Sequence[Clip],
    *,
    pooling: Pooling,
    by_clause: bool = False,
) -> AnswerStates:
    """Compute the states of rows (B) on the CPU, clip by clip: a row's states do not depend on which other clips occur.

    Args:
        captioner: model whose states are read.
        rows: prompts with answers; the clip and the prompt of several rows go through the decoder once.
        clips: clips that the rows are about.
        pooling: see `salmonn.model.pooling`.
        by_clause: with pooling "clauses", return the states of the clauses of all rows instead of their sums.
    """
    network, by_clip = captioner.network, dict[int, list[int]]()
    for index, row in enumerate(rows):
        by_clip.setdefault(row.clip, []).append(index)
    order, prompt, answer = list[int](), list[Tensor](), list[Tensor]()
    for clip, indices in by_clip.items():
        for start in range(0, len(indices), MAX_ROWS):
            part = indices[start : start + MAX_ROWS]
            inputs = captioner.processor.collate([replace(rows[index], clip=0) for index in part], [clips[clip]])
            states = network(inputs.to(network.device), pooling="tokens" if pooling == "clauses" else pooling)
            prompt.append(states.prompt.cpu())
            values = states.answer.cpu()
            if pooling == "clauses":
                texts = [rows[index].answer or "" for index in part]
                lengths = (inputs.labels != -100).sum(1).tolist()
                pooled = [
                    pool_clauses(one, text, captioner.processor, width=states.prompt.shape[1])
                    for one, text in zip(values.split(lengths), texts, strict=True)
                ]
                answer += pooled if by_clause else [one.sum(0, keepdim=True) for one in pooled]
            else:
                answer += values.split(1)
            order += part
    inverse = torch.tensor(order).argsort().tolist()
    return AnswerStates(
        torch.cat(prompt)[inverse], torch.cat([answer[index] for index in inverse]), request_states(captioner, rows)
    )


@torch.no_grad()
def request_states(captioner: Captioner, rows: Sequence[PromptRow]) -> Tensor:
    """Compute the states of what is asked for (B, D), on the CPU: means over the prompts' tokens, without their clips.

    Behind a clip, most of a prompt's state is the clip's: of that of the toy model, 79 % of the variance, while the
    request is 16 %. A gate that reads it learns clips by heart before it learns requests (docs/lab.md).

    Args:
        captioner: model whose states are read.
        rows: prompts, whose answers are ignored.
    """
    network, found = captioner.network, dict[PromptRow, Tensor]()
    asked = [replace(row, clip=0, answer=None, finished=True) for row in rows]
    for row in dict.fromkeys(asked):
        inputs = captioner.processor.collate([row], [no_clip(network.feature_width)]).to(network.device)
        # Pooled are the tokens with a label.
        found[row] = network(replace(inputs, labels=inputs.input_ids), pooling="mean").answer.cpu()
    return torch.cat([found[row] for row in asked])
