"""Rewards for people with different preferences: each rater is a mixture of K prototypes of preference.

PAL (Chen et al., arXiv 2406.08469): a rater i has weights w_i in the simplex over K prototypes, and chooses between two
captions by Bradley and Terry's model, with one of three rewards of a caption with the state x:

    score      sum_k w_ik r_k(x)                     r: K outputs of one network
    distance   -||f(x) - f(sum_k w_ik p_k)||         PAL-A; p_k: points in the space of the states
    angle      s cos(f(x), sum_k w_ik g_k(prompt))   PAL-B; the prototypes depend on the clip and the request

K = 1 is an ordinary reward model: one reward for all. A new rater only needs K numbers, with everything else fixed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

Form = Literal["score", "distance", "angle"]
CANDIDATES = (1, 2, 3, 4, 6)
MAX_SCALE = 100.0  # of `angle`
FIRST_SCALE = 1 / 0.07
RATER_PENALTY = 0.02
RATER_STEPS = 50


@dataclass(frozen=True)
class IdealPointConfig:
    """Sizes and optimization of a model of raters.

    Args:
        form: reward of a mixture of prototypes: score, distance or angle.
        dim: size of the space of `distance` and `angle`.
        hidden: hidden units of each network.
        dropout: dropout of the hidden units.
        epochs: passes over the votes.
        batch_size: votes in each step.
        learning_rate, weight_decay: of AdamW for the networks and the points.
        rater_learning_rate: learning rate of the raters' weights, which do not decay.
    """

    form: Form = "score"
    dim: int = 32
    hidden: int = 64
    dropout: float = 0.3
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    rater_learning_rate: float = 5e-2

    def __post_init__(self) -> None:
        if min(self.dim, self.hidden, self.epochs, self.batch_size) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "dim, hidden, epochs and batch_size must be at least 1, and dropout at least 0 and below 1, got "
                f"{self.dim}, {self.hidden}, {self.epochs}, {self.batch_size} and {self.dropout}"
            )


@dataclass(frozen=True)
class Votes:
    """N votes of raters between two captions, (N,) integers each.

    Args:
        better, worse: rows of the captions' states.
        rater: index of the rater.
        clip: index of the clip.
    """

    better: Tensor
    worse: Tensor
    rater: Tensor
    clip: Tensor

    def __len__(self) -> int:
        return len(self.better)

    def select(self, chosen: Tensor) -> "Votes":
        """Return some of the votes, by a mask or by indices (M,)."""
        return Votes(*(getattr(self, name)[chosen] for name in ("better", "worse", "rater", "clip")))


@dataclass(frozen=True)
class Encoded:
    """What the reward of any mixture is computed from, for B captions.

    Args:
        points: (B, K) rewards of `score`; (B, dim) places of the captions of the other forms.
        prototypes: (B, K, dim) of `angle`; None for the other forms, whose prototypes are the same for all captions.
    """

    points: Tensor
    prototypes: Tensor | None = None

    def rows(self, index: Tensor) -> "Encoded":
        """Return some of the captions."""
        return Encoded(self.points[index], None if self.prototypes is None else self.prototypes[index])

    @classmethod
    def join(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """Return the captions of all parts in order; there must be at least one part."""
        prototypes = [one.prototypes for one in parts if one.prototypes is not None]
        return cls(torch.cat([one.points for one in parts]), torch.cat(prototypes) if prototypes else None)


class IdealPointHead(nn.Module):
    """K prototypes of preference over the states of captions.

    Args:
        width, prompt_width: sizes of a caption's state and of its prompt's.
        num_prototypes: K.
        config: form and sizes.
    """

    answer_mean: Tensor
    answer_scale: Tensor
    prompt_mean: Tensor
    prompt_scale: Tensor

    def __init__(self, width: int, prompt_width: int, *, num_prototypes: int, config: IdealPointConfig) -> None:
        super().__init__()
        self.num_prototypes, self.form = num_prototypes, config.form
        for name, size in (("answer", width), ("prompt", prompt_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.project = _network(width, num_prototypes if config.form == "score" else config.dim, config)
        if config.form == "distance":
            self.points = nn.Parameter(F.normalize(torch.randn(num_prototypes, width), dim=1))
        elif config.form == "angle":
            self.targets = _network(prompt_width, num_prototypes * config.dim, config)
            self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def standardize(self, answer: Tensor, prompt: Tensor) -> None:
        """Take the mean and the standard deviation of the training states (R, P) and (R, D) as the inputs' scale."""
        for name, states in (("answer", answer), ("prompt", prompt)):
            std, mean = torch.std_mean(states.float(), dim=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").copy_(torch.where(std > 0, std, 1.0))

    def forward(self, answer: Tensor, prompt: Tensor) -> Encoded:
        """Encode captions by their states (B, P) and those of their prompts (B, D)."""
        points = self.project((answer - self.answer_mean) / self.answer_scale)
        if self.form != "angle":
            return Encoded(points)
        targets = self.targets((prompt - self.prompt_mean) / self.prompt_scale)
        return Encoded(points, targets.view(len(targets), self.num_prototypes, -1))

    def reward(self, encoded: Encoded, weights: Tensor) -> Tensor:
        """Return the reward (B,) of each caption for a mixture of prototypes, weights (B, K) or (K,)."""
        if self.form == "score":
            return (encoded.points * weights).sum(-1)
        if self.form == "distance":
            # A small constant, since the gradient of a distance of 0 is undefined.
            return -((encoded.points - self.project(weights @ self.points)).square().sum(-1) + 1e-12).sqrt()
        assert encoded.prototypes is not None
        ideal = (weights.unsqueeze(-1) * encoded.prototypes).sum(-2)
        return self.log_scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(encoded.points, ideal, dim=-1)

    def prototype_rewards(self, encoded: Encoded) -> Tensor:
        """Return the reward of each caption for each prototype alone, (B, K)."""
        alone = torch.eye(self.num_prototypes).to(encoded.points)
        return torch.stack([self.reward(encoded, weights) for weights in alone], dim=-1)


def _network(size: int, outputs: int, config: IdealPointConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, config.hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.hidden, outputs)
    )


@dataclass(frozen=True)
class RaterModel:
    """A head with the raters that it was fitted to.

    Args:
        head: the head.
        weights: (R, K) weights of each rater; a rater without votes has the mean of the others.
    """

    head: IdealPointHead
    weights: Tensor

    @property
    def prior(self) -> Tensor:
        """Mean weights of the known raters (K,), the start of new ones; also the size of each prototype."""
        return self.weights.mean(0)

    @property
    def entropy(self) -> Tensor:
        """How mixed each rater is, (R,): from 0, one prototype, to 1, all equally."""
        if self.head.num_prototypes == 1:
            return torch.zeros(len(self.weights))
        entropy = -torch.special.xlogy(self.weights, self.weights).sum(1)
        return entropy / math.log(self.head.num_prototypes)

    @torch.no_grad()
    def margins(self, encoded: Encoded, votes: Votes) -> Tensor:
        """Return reward of the better minus that of the worse caption for the rater of each vote, (N,)."""
        weights = self.weights[votes.rater]
        return self.head.reward(encoded.rows(votes.better), weights) - self.head.reward(
            encoded.rows(votes.worse), weights
        )


def fit_raters(
    answer: Tensor, prompt: Tensor, votes: Votes, *, num_raters: int, num_prototypes: int, config: IdealPointConfig,
    seed: int = 0,
) -> RaterModel:  # fmt: skip
    """Fit prototypes and the weights of raters to votes; every rater counts the same, with few votes or many.

    Args:
        answer, prompt: (R, P) and (R, D) states of captions and of their prompts.
        votes: votes, whose captions are rows of the states.
        num_raters: number of raters, with or without votes.
        num_prototypes: K.
        config: form, sizes and optimization.
        seed: seed of initialization, dropout and order. The global random state does not change.

    Raises:
        ValueError: there are no votes.
    """
    if not len(votes):
        raise ValueError("there are no votes to fit raters to: the raters of votes have ids, and prefer a caption")
    counts = torch.bincount(votes.rater, minlength=num_raters)
    importance = len(votes) / (counts.count_nonzero() * counts[votes.rater])  # mean 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = IdealPointHead(answer.shape[1], prompt.shape[1], num_prototypes=num_prototypes, config=config)
        head.standardize(answer, prompt)
        logits = nn.Parameter(torch.zeros(num_raters, num_prototypes))
        optimizer = torch.optim.AdamW(
            [
                {"params": list(head.parameters()), "lr": config.learning_rate, "weight_decay": config.weight_decay},
                {"params": [logits], "lr": config.rater_learning_rate, "weight_decay": 0.0},
            ]
        )
        for _ in range(config.epochs):
            for batch in torch.randperm(len(votes)).split(config.batch_size):
                some = votes.select(batch)
                rows = torch.cat([some.better, some.worse])
                weights = logits.softmax(1)[some.rater].repeat(2, 1)
                better, worse = head.reward(head(answer[rows], prompt[rows]), weights).chunk(2)
                loss = (importance[batch] * F.softplus(worse - better)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    head.eval().requires_grad_(False)
    weights = logits.detach().softmax(1)
    weights[counts == 0] = weights[counts > 0].mean(0)
    return RaterModel(head, weights)


def fit_new_rater(
    head: IdealPointHead, better: Encoded, worse: Encoded, prior: Tensor, *, penalty: float = RATER_PENALTY
) -> Tensor:
    """Fit the weights of a new rater to N votes with everything else fixed, in milliseconds.

    The mean loss of the votes + penalty * ||d||^2 is minimized over d, where the weights are softmax(log prior + d). So
    a rater without votes has the prior.

    Args:
        head: fitted head.
        better, worse: the captions of the votes, N rows each.
        prior: (K,) weights before any vote, none 0.
        penalty: weight of the distance from the prior.

    Returns:
        (K,) weights.
    """
    if head.num_prototypes == 1 or not len(better.points):
        return prior
    shift = torch.zeros_like(prior, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=RATER_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = (prior.log() + shift).softmax(0)
        margins = head.reward(better, weights) - head.reward(worse, weights)
        loss: Tensor = F.softplus(-margins).mean() + penalty * shift.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (prior.log() + shift.detach()).softmax(0)


@dataclass(frozen=True)
class HeldoutAccuracy:
    """How well a number of prototypes predicts held-out votes.

    Args:
        num_prototypes: K.
        accuracy: share of the votes that are predicted; each rater counts the same.
        standard_error: of the accuracy, for other raters and other clips.
    """

    num_prototypes: int
    accuracy: float
    standard_error: float


def choose_num_prototypes(
    answer: Tensor, prompt: Tensor, votes: Votes, *, num_raters: int, config: IdealPointConfig,
    candidates: Sequence[int] = CANDIDATES, num_folds: int = 5, seed: int = 0,
) -> tuple[int, list[HeldoutAccuracy]]:  # fmt: skip
    """Choose K by cross-validation: the smallest whose accuracy is within one standard error of the best one's.

    A fold holds out all votes on some clips, so that no vote on the same captions is trained on; the raters are known
    from their votes on other clips. Accuracy is compared instead of likelihood, which also depends on the scale of the
    rewards, and that scale grows with K. The squared errors over raters and over clips are added, which is
    conservative.

    Returns:
        K, and the accuracies of all candidates.

    Raises:
        ValueError: the votes are on one clip only.
    """
    clips = votes.clip.unique()
    if len(clips) < 2:
        raise ValueError(
            f"the number of prototypes is chosen on held-out clips, but there are votes on {len(clips)} clip to learn "
            "from; collect votes on more clips, or give --prototypes"
        )
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty(int(clips.max()) + 1, dtype=torch.long)
    fold_of[clips[order]] = torch.arange(len(clips)) % num_folds
    fold = fold_of[votes.clip]
    table = []
    for count in candidates:
        margins = torch.zeros(len(votes))
        for number in range(num_folds):
            train, test = votes.select(fold != number), votes.select(fold == number)
            model = fit_raters(
                answer, prompt, train, num_raters=num_raters, num_prototypes=count, config=config, seed=seed
            )
            with torch.no_grad():
                margins[fold == number] = model.margins(model.head(answer, prompt), test)
        by_rater, by_clip = accuracy_by(votes.rater, margins), accuracy_by(votes.clip, margins)
        variance = sum(float(one.var(correction=0)) / len(one) for one in (by_rater, by_clip))
        table.append(HeldoutAccuracy(count, float(by_rater.mean()), math.sqrt(variance)))
    best = max(table, key=lambda one: one.accuracy)
    return min(one.num_prototypes for one in table if one.accuracy >= best.accuracy - best.standard_error), table


def accuracy_by(group: Tensor, margins: Tensor) -> Tensor:
    """Return the share of votes with a positive margin in each group (rater or clip) that has votes."""
    present, index = group.unique(return_inverse=True)
    right = torch.zeros(len(present)).index_add_(0, index, (margins > 0).float())
    return right / torch.bincount(index)


def describe_prototypes(
    rewards: Tensor, traits: Tensor, clip: Tensor, *, names: Sequence[str]
) -> list[dict[str, float]]:
    """Describe prototypes by what they reward: coefficients of a regression on traits of captions, within clips.

    Args:
        rewards: (B, K) reward of each caption for each prototype.
        traits: (B, J) what is known of the captions, such as the share of events heard.
        clip: (B,) index of each caption's clip; only differences within a clip decide votes.
        names: names of the traits.

    Returns:
        For each prototype, name -> standardized coefficient, the largest first. They sum to no total: correlated traits
        share their effect.
    """
    outcome, inputs = (_standardize_within(one.double(), clip) for one in (rewards, traits))
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    coefficients = torch.linalg.solve(gram, inputs.T @ outcome)
    return [
        dict(sorted(zip(names, column.tolist(), strict=True), key=lambda item: -abs(item[1])))
        for column in coefficients.T
    ]


def match_prototypes(rewards: Tensor, others: Tensor, clip: Tensor) -> list[int]:
    """Match the prototypes of two models, one to one, so that the sum of their correlations within clips is largest.

    Args:
        rewards, others: (B, K) reward of each caption for each prototype of either model.
        clip: (B,) index of each caption's clip.

    Returns:
        For each of the first model's prototypes, the index of the second model's.
    """
    first, second = (_standardize_within(one.double(), clip) for one in (rewards, others))
    _, columns = linear_sum_assignment((first.T @ second).numpy(), maximize=True)
    return [int(column) for column in columns]


def _standardize_within(values: Tensor, clip: Tensor) -> Tensor:
    """Subtract each clip's mean from values (B, J), and divide by the standard deviation of what remains."""
    clips, index = clip.unique(return_inverse=True)
    sums = torch.zeros(len(clips), values.shape[1], dtype=values.dtype).index_add_(0, index, values)
    centred = values - (sums / torch.bincount(index).unsqueeze(1))[index]
    std = centred.std(0)
    return centred / torch.where(std > 0, std, 1.0)


def sort_prototypes(model: RaterModel) -> RaterModel:
    """Return the model with its prototypes in order of size, the largest first; their rewards do not change."""
    head, order = model.head, model.prior.argsort(descending=True, stable=True)
    if head.form == "distance":
        head.points.data = head.points.data[order]
        return replace(model, weights=model.weights[:, order])
    last = (head.project if head.form == "score" else head.targets)[-1]
    assert isinstance(last, nn.Linear)
    for parameter in (last.weight, last.bias):
        by_prototype = parameter.data.view(head.num_prototypes, -1, *parameter.shape[1:])
        parameter.data = by_prototype[order].reshape(parameter.shape)
    return replace(model, weights=model.weights[:, order])
