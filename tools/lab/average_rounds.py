"""Evaluate averages of the models of an mrDPO run's rounds on its held-out clips, without training.

    OMP_NUM_THREADS=1 python tools/lab/average_rounds.py --run run --weights "[[0, 0, 1, 1], [0, 1, 1, 1]]"

Each list has the weights of the start and of the models after round 1, 2, ...; the first above is the mean of rounds 2
and 3, as in model soups (arXiv 2203.05482). As each round's adapter is added to those before, a mean of rounds is also
a run with smaller last updates. So each average has a control: the last round's model, moved along the line through
the start to the average's distance from the start. The weights of one round alone give its logged figures again.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.cli.options import new_table
from salmonn.config import parse_config, run_recipe
from salmonn.files import write_json
from salmonn.model.lora import read_factors
from salmonn.preference.reward import make_judge, make_reward
from salmonn.score.metrics import Rates
from salmonn.train.encoding import cache_features
from salmonn.train.evaluate import evaluate
from salmonn.train.feature_cache import open_feature_cache
from salmonn.train.mrdpo import MrDpoConfig, load_data
from salmonn.train.run_log import COLUMNS, format_figure

log = logging.getLogger("average rounds")
Update = Mapping[str, Tensor]  # name of a weight of the language model -> what is added to the start's


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Averages to evaluate.

    Args:
        run: folder of an mrDPO run.
        weights: for each average, the weights of the start and of the rounds' models; they are divided by their sum.
        control: also evaluate the last round's model at the same distance from the start.
        out: JSON file for distances and rates; none for averages.json in the run's folder.
    """

    run: Path = Path("run")
    weights: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0))
    control: bool = True
    out: Path | None = None

    def __post_init__(self) -> None:
        for one in self.weights:
            if len(one) < 2 or not math.isfinite(sum(one)) or sum(one) <= 0:
                raise ValueError(
                    f"weights of the start and of at least one round must have a sum above 0, got {list(one)}"
                )


@dataclass(frozen=True)
class Result:
    """Figures of one average.

    Args:
        name: its weights, or what it is a control of.
        distance: Frobenius norm of the difference to the start's weights.
        rates: held-out rates.
    """

    name: str
    distance: float
    rates: Rates


def main(config: AverageConfig) -> None:
    """Evaluate all averages and their controls, print the table and write the results."""
    dist.setup()
    run: MrDpoConfig = parse_config(MrDpoConfig, description="", args=["--config", str(config.run / "mrdpo.yaml")])
    captioner, judge = run.load_model(run.model), make_judge(run.judge)
    _, heldout = load_data(run, make_reward(run.reward, judge=judge), captioner.processor, judge=judge)
    cache = open_feature_cache(run.feature_cache, captioner)
    (heldout,) = cache_features(captioner, heldout, name="clips", cache=cache)
    lm, results = captioner.network.lm, list[Result]()
    updates = list_updates(config)
    start = {name: lm.get_parameter(name).clone() for update in updates.values() for name in update}
    for name, update in updates.items():
        set_weights(captioner, start, update)
        rates = evaluate(captioner, heldout, judge=judge, sampling=run.sampling, name=name).rates
        results.append(Result(name, norm_of(update), rates))
        log.info("%s: total %.3f, repetition %.3f", name, rates.total, rates.repetition)
    print_results(results)
    write_json(config.out or config.run / "averages.json", [asdict(one) for one in results])


def list_updates(config: AverageConfig) -> dict[str, Update]:
    """Return name -> update of the start's weights, of each average and its control.

    Raises:
        FileNotFoundError: the run has not trained a round that has a weight.
    """
    updates = dict[str, Update]()
    for weights in config.weights:
        folders = [config.run / f"round_{number}" / "adapter" for number in range(1, len(weights))]
        name = " ".join(f"{weight:g}" for weight in weights)
        average = sum_adapters(folders, adapter_weights(weights))
        updates[name] = average
        if config.control:
            last = sum_adapters(folders, [1.0] * len(folders))
            factor = norm_of(average) / norm_of(last)
            updates[f"last round x {factor:.3f}, control of {name}"] = scale(last, factor)
    return updates


def adapter_weights(weights: Sequence[float]) -> list[float]:
    """Return the factor of each round's adapter in an average of models, which have the adapters of all rounds so far.

    Args:
        weights: weights of the start and of the rounds' models.
    """
    return [sum(weights[number:]) / sum(weights) for number in range(1, len(weights))]


@torch.no_grad()
def sum_adapters(folders: Sequence[Path], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of saved adapters, by the names of the weights that they change."""
    total = dict[str, Tensor]()
    for folder, factor in zip(folders, factors, strict=True):
        for key, adapter in read_factors(folder).items():
            update = factor * adapter.product(torch.device("cpu"))
            name = f"{key}.weight"
            total[name] = total[name] + update if name in total else update
    return total


def scale(update: Update, factor: float) -> Update:
    """Return an update multiplied by a factor."""
    return {name: factor * tensor for name, tensor in update.items()}


def norm_of(update: Update) -> float:
    """Return the Frobenius norm of an update over all weights."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in update.values()))


@torch.no_grad()
def set_weights(captioner: Captioner, start: Mapping[str, Tensor], update: Update) -> None:
    """Set the language model's weights to the start's plus an update, added in float32."""
    for name, tensor in start.items():
        weight = captioner.network.lm.get_parameter(name)
        weight.copy_(tensor.float() + update[name].to(weight.device) if name in update else tensor)


def print_results(results: Sequence[Result]) -> None:
    """Print the table of all averages, in percent."""
    table = new_table(f"{results[0].rates.clips} held-out clips, %", ("distance", *COLUMNS.values(), "words"))
    for one in results:
        figures = (format_figure(title, getattr(one.rates, key)) for key, title in COLUMNS.items())
        table.add_row(one.name, f"{one.distance:.2f}", *figures, f"{one.rates.words:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    run_recipe(main, AverageConfig, description=__doc__)
