"""Rewards by clause: a judge says which clauses of a caption are right, so each of them is a separate label.

Total is (N - correct + hallucinated) / N for a clip of N events. Within a clip it depends only on the sum of

    credit(clause) = correct events - hallucinations that the judge quotes from the clause

so a caption's reward is the sum of its clauses' predicted credits, and a judged caption of six clauses gives six labels
instead of one. Fine-grained RLHF (arXiv 2306.01693) rewards the parts of an answer in the same way.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from salmonn.caption.processor import Processor
from salmonn.model.pooling import NUM_CLAUSE_FIGURES, AnswerStates
from salmonn.preference.comparisons import AnswerGroup, attach_values
from salmonn.records import Caption, Score
from salmonn.score.repetition import find_clauses
from salmonn.score.text_spans import CharSpan, find_all_quotes


def clause_credits(score: Score, text: str) -> tuple[float, ...]:
    """Return the credit of each clause of a judged caption, by the judge's quotes.

    A quote counts for the clause that it shares most characters with; if it occurs several times, for the first
    occurrence that no earlier quote has taken. Quotes that are not in the text are ignored.
    """
    clauses, taken = find_clauses(text), set[CharSpan]()
    credits = [0.0] * len(clauses)
    quotes = [(mention.quote, float(mention.is_correct)) for mention in score.mentions]
    for quote, credit in [*quotes, *((quote, -1.0) for quote in score.hallucinations)]:
        places = list(find_all_quotes(quote, text))
        if not places or not clauses:
            continue
        place = next((one for one in places if one not in taken), places[0])
        taken.add(place)
        shared = [min(place[1], end) - max(place[0], start) for start, end in clauses]
        credits[shared.index(max(shared))] += credit
    return tuple(credits)


def attach_credits(
    groups: Sequence[AnswerGroup], captions: Sequence[Caption], scores: Sequence[Score]
) -> list[AnswerGroup]:
    """Return groups of judged captions with the credits of each answer's clauses.

    Args:
        groups: comparisons of these captions.
        captions, scores: judged captions, matched by video, sample and part of the video.
    """
    score_of = {(one.video, one.sample, one.start_seconds, one.end_seconds): one for one in scores}
    credits = {}
    for one in captions:
        span = (one.start_seconds, one.end_seconds)
        if score := score_of.get((one.video, one.sample, *span)):
            credits[one.video, *span, one.text, one.finished] = clause_credits(score, one.text)
    return attach_values(groups, credits, name="credits")


def pool_clauses(tokens: Tensor, text: str, processor: Processor, *, width: int) -> Tensor:
    """Return the state (C, P) of each clause of an answer.

    It is 1; mean and last of the layers; maximum of the output; then sum and minimum of the log-probabilities, and mean
    and maximum of the entropies. A token belongs to the first clause that ends after the token's start; the end of the
    answer belongs to none.

    Args:
        tokens: (L, U * D + 2) output of the upper layers and of the decoder at each token, log-probability and entropy.
        text: the answer.
        processor: has the tokenizer.
        width: D.
    """
    ends = [end for _, end in find_clauses(text)]
    offsets = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    clause = torch.tensor(
        [next((index for index, end in enumerate(ends) if start < end), len(ends) - 1) for start, _ in offsets],
        dtype=torch.long,
    )
    pooled = [tokens.new_zeros(0, 1 + 2 * (tokens.shape[1] - 2) + width + NUM_CLAUSE_FIGURES)]
    for index in range(len(ends)):
        own = tokens[: len(clause)][clause == index]
        if not len(own):  # no token starts in it
            own = tokens[:1]
        states, logps, entropies = own[:, :-2], own[:, -2], own[:, -1]
        figures = torch.stack([logps.sum(), logps.min(), entropies.mean(), entropies.max()])
        parts = [tokens.new_ones(1), states.mean(0), states[-1], states[:, -width:].amax(0), figures]
        pooled.append(torch.cat(parts).unsqueeze(0))
    return torch.cat(pooled)


def sum_clauses(states: AnswerStates, answers: Sequence[tuple[str, bool]]) -> AnswerStates:
    """Return the states of answers: each is the sum of those of its clauses.

    Args:
        states: states of the clauses of all answers, which follow each other.
        answers: (text, finished) of each answer.
    """
    parts = states.answer.split([len(find_clauses(text)) for text, _ in answers])
    return replace(states, answer=torch.stack([one.sum(0) for one in parts]))
