"""States of all answers about clips, which the heads of reward models read: computed once and kept in a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.files import temporary_path
from salmonn.model.fingerprint import hash_model, hash_values
from salmonn.model.layout import ClipFeatures
from salmonn.model.pooling import AnswerStates, Pooling
from salmonn.preference.comparisons import AnswerGroup
from salmonn.preference.states import answer_rows, answer_states
from salmonn.train.batches import map_batches
from salmonn.train.feature_cache import hash_features, hash_tokenizer

STATES_NAME = "states.safetensors"
STATES_FORMAT = 3


@dataclass(frozen=True)
class RewardExample:
    """Answers about a clip, with the features that are read with them."""

    group: AnswerGroup
    features: ClipFeatures

    def rows(self, *, clip: int = 0) -> list[PromptRow]:
        """Return a row for each answer."""
        return answer_rows(self.group, clip=clip)


def compute_states(
    captioner: Captioner, examples: Sequence[RewardExample], *, pooling: Pooling, name: str, path: Path | None = None
) -> list[AnswerStates]:
    """Compute the states of all answers on all ranks, clip by clip.

    Args:
        captioner: model whose states are read.
        examples: clips with their answers.
        pooling: see `salmonn.model.pooling`.
        name: title of the progress bar.
        path: file that keeps the states; a later call with equal weights, clips and answers reads it.

    Returns:
        The states of each example; with pooling "clauses" those of all clauses of its answers.
    """
    fingerprint = _states_fingerprint(captioner, examples, pooling) if path else ""
    if path and (kept := _read_states(path, fingerprint)) is not None:
        return kept

    def compute(number: int) -> list[AnswerStates]:
        example = examples[number]
        by_clause = pooling == "clauses"
        return [answer_states(captioner, example.rows(), [example.features], pooling=pooling, by_clause=by_clause)]

    costs = [
        len(example.features) + sum(len(text.split()) for text, _ in example.group.answers) for example in examples
    ]
    states = map_batches(compute, [[index] for index in range(len(examples))], costs, name=name, unit="clip")
    if path and dist.is_main():
        _write_states(path, states, fingerprint)
    dist.barrier()
    return states


def _states_fingerprint(captioner: Captioner, examples: Sequence[RewardExample], pooling: Pooling) -> str:
    """Hash everything that states depend on."""
    model = dist.gather([hash_model(captioner.network) if dist.is_main() else ""])[0]
    clips = dist.gather([hash_features(example.features) for example in dist.shard(examples)])
    rows = [[(row.prompt, row.answer, row.history, row.finished) for row in example.rows()] for example in examples]
    return hash_values(
        STATES_FORMAT, model, clips, rows, pooling, hash_tokenizer(captioner.processor), captioner.network.dtype
    )


def _write_states(path: Path, states: Sequence[AnswerStates], fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "prompt": torch.cat([one.prompt for one in states]),
        "answer": torch.cat([one.answer for one in states]),
        "request": torch.cat([one.request for one in states if one.request is not None]),
        "lengths": torch.tensor([[len(one.prompt), len(one.answer)] for one in states]),
    }
    temporary = temporary_path(path)
    save_file(tensors, str(temporary), metadata={"fingerprint": fingerprint})
    temporary.replace(path)


def _read_states(path: Path, fingerprint: str) -> list[AnswerStates] | None:
    """Return kept states on all ranks if they are current; only rank 0 reads, as NFS shows new files late."""
    states = None
    if dist.is_main() and path.is_file():
        with safe_open(str(path), framework="pt") as file:
            if file.metadata().get("fingerprint") == fingerprint:
                num_rows, num_answers = file.get_tensor("lengths").T.tolist()
                split = {"prompt": num_rows, "answer": num_answers, "request": num_rows}
                parts = (file.get_tensor(name).split(own) for name, own in split.items())
                states = [AnswerStates(*one) for one in zip(*parts, strict=True)]
    return dist.gather([states])[0]
