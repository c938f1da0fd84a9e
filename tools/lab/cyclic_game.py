"""Play the game of the voter `cycle` on a table: today's rounds, a frozen reference, and Nash learning. No model.

    python tools/lab/cyclic_game.py --facts run/lab/pairs/seed_2/facts.json --seed 2 --out game.json

A policy is a distribution over phrases for sounds, which starts at that of a model's samples. A round draws 8 samples
for each of 230 clips, a vote between each two of a clip, and moves the policy to the exact solution of its regression
on the win rates. Exploitability is how much more than half of the votes the best reply to the policy gets.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from salmonn.files import read_json, write_json
from salmonn.synthetic.raters import SOUND_FORMS

Numbers = NDArray[np.float64]
FORMS = (*SOUND_FORMS, "")
BETA, ETA = 0.1, 0.5
NUM_CLIPS, NUM_SAMPLES, NUM_ROUNDS, NUM_RUNS = 230, 8, 6, 20
# P(row beats column): each of the first three beats the next with 0.9, and the last one with 0.7.
PREFERENCE = np.array([[0.5, 0.9, 0.1, 0.7], [0.1, 0.5, 0.9, 0.7], [0.9, 0.1, 0.5, 0.7], [0.3, 0.3, 0.3, 0.5]])
Method = Callable[[Numbers, Numbers, np.random.Generator], Numbers]  # start, policy, generator -> next policy


def main(arguments: Sequence[str] | None = None) -> None:
    """Play all methods and write their exploitability after each round."""
    parser = ArgumentParser(description="Play the game of a cyclic voter on a table.")
    parser.add_argument("--facts", type=Path, required=True, help="facts.json of vote_pairs.py, with the shares")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    options = parser.parse_args(arguments)
    shares = read_json(options.facts)["sound_forms"]
    start = normalize(np.array([shares.get(form, 0.0) for form in FORMS]))
    results = {
        name: np.mean([play(method, start, seed=1000 * options.seed + run) for run in range(NUM_RUNS)], axis=0).tolist()
        for name, method in METHODS.items()
    }
    write_json(options.out, {"start": exploitability(start)} | results)


def play(method: Method, start: Numbers, *, seed: int) -> list[float]:
    """Return the exploitability after each round."""
    rng, policy, found = np.random.default_rng(seed), start, []
    for _ in range(NUM_ROUNDS):
        policy = method(start, policy, rng)
        found.append(exploitability(policy))
    return found


def exploitability(policy: Numbers) -> float:
    """Return the largest win rate of a single form against the policy, less one half."""
    return float((PREFERENCE @ policy).max() - 0.5)


def win_rates(policy: Numbers, opponent: Numbers, rng: np.random.Generator) -> Numbers:
    """Return the share of drawn votes that each form gets against samples of the opponent; 0.5 for one not sampled."""
    own = rng.choice(len(policy), size=(NUM_CLIPS, NUM_SAMPLES), p=policy)
    others = own if opponent is policy else rng.choice(len(policy), size=own.shape, p=opponent)
    wins = rng.random((NUM_CLIPS, NUM_SAMPLES, NUM_SAMPLES)) < PREFERENCE[own[:, :, None], others[:, None, :]]
    counts = np.ones((NUM_SAMPLES, NUM_SAMPLES))
    if opponent is policy:  # a sample is not compared with itself
        np.fill_diagonal(counts, 0)
    rates = (wins * counts).sum(-1) / counts.sum(-1)
    return np.array([rates[own == form].mean() if (own == form).any() else 0.5 for form in range(len(policy))])


def renewed(start: Numbers, policy: Numbers, rng: np.random.Generator) -> Numbers:
    """Take a round of today's loop: the reference policy is the round's start."""
    return normalize(policy * np.exp(win_rates(policy, policy, rng) / BETA))


def frozen(start: Numbers, policy: Numbers, rng: np.random.Generator) -> Numbers:
    """Take a round whose reference policy is the run's start."""
    return normalize(start * np.exp(win_rates(policy, policy, rng) / BETA))


def mixed(start: Numbers, policy: Numbers, rng: np.random.Generator) -> Numbers:
    """Take a round with both as the reference policy, as `--reference-policy mixed --loss.kind nash`."""
    return proximal(start, policy, win_rates(policy, policy, rng))


def extrapolated(start: Numbers, policy: Numbers, rng: np.random.Generator) -> Numbers:
    """Take a round of Nash Mirror Prox (arXiv 2505.19731): the opponent is the policy that one such step leads to."""
    half = mixed(start, policy, rng)
    return proximal(start, policy, win_rates(policy, half, rng))


def proximal(start: Numbers, policy: Numbers, wins: Numbers) -> Numbers:
    """Return start^(eta / (1 + eta)) * policy^(1 / (1 + eta)) * exp(eta / (1 + eta) * wins / beta), normalized."""
    return normalize(start ** (ETA / (1 + ETA)) * policy ** (1 / (1 + ETA)) * np.exp(ETA / (1 + ETA) * wins / BETA))


def normalize(weights: Numbers) -> Numbers:
    """Return weights divided by their sum."""
    return weights / weights.sum()


METHODS: dict[str, Method] = {
    "renewed": renewed, "frozen": frozen, "mixed": mixed, "extrapolated": extrapolated,
}  # fmt: skip


if __name__ == "__main__":
    main()
