"""Train on simulated people's votes alone, by recipes/dpo.py, and evaluate the model on held-out clips.

    python tools/lab/votes.py --captions run/lab/loop/seed_2/all/round_1/captions.jsonl --seed 2 \\
        --votes 400 --out run/lab/votes/seed_2/noisy_400 [--loss.kind=robust --loss.label_smoothing=0.3]

Ten people of one kind vote on captions of a round, and nothing else is trained on: no reference caption, no reward. The
judge is used to measure only. Unknown flags are passed on to the recipe.
"""

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.files import write_json
from salmonn.model.loading import Placement
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import VoterKind
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import CLIPS_NAME, heldout_config, render_clips
from salmonn.train.encoding import cache_features
from salmonn.train.evaluate import evaluate, write_evaluation
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.sampling import SampleConfig

ROOT = Path(__file__).parent.parent.parent
NUM_PEOPLE = 10
NUM_CLIPS, NUM_HELDOUT, NUM_QUESTIONS = 230, 160, 4  # as in recipes/configs/ablation.yaml
# The training of a round of that configuration. Without a ground truth there is no cross-entropy.
TRAINING = (
    "--lora.rank=16", "--lora.alpha=32", "--fit.learning_rate=2.5e-4", "--fit.steps=50", "--fit.batch_size=16",
    "--fit.warmup_ratio=0.12", "--fit.weight_decay=0.01",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the votes, train on them, and evaluate; what exists is not made again."""
    parser = ArgumentParser(description="Train on simulated votes alone, and evaluate the model.")
    parser.add_argument("--captions", type=Path, required=True, help="captions of a round, several of each clip")
    parser.add_argument("--clips_dir", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--features", type=Path, required=True, help="folder of the feature cache")
    parser.add_argument("--voter", choices=get_args(VoterKind), default="noisy", help="kind of the people")
    parser.add_argument("--votes", type=int, default=400, help="number of votes of all people")
    parser.add_argument("--seed", type=int, default=0, help="random seed; the clips have seed 200 + this")
    parser.add_argument("--out", type=Path, required=True, help="folder for votes, model and evaluation")
    options, flags = parser.parse_known_args(arguments)
    synth = SynthConfig(clips=NUM_CLIPS, seed=200 + options.seed, questions=NUM_QUESTIONS)
    votes = options.out / "votes"
    if not votes.exists():
        references = options.clips_dir / f"seed{synth.seed}-{NUM_CLIPS}" / CLIPS_NAME
        run("tools/raters.py", str(options.captions), f"--references={references}", f"--out={votes}",
            f"--kind={options.voter}", f"--raters={NUM_PEOPLE}", f"--votes={max(1, options.votes // NUM_PEOPLE)}",
            f"--seed={options.seed}")  # fmt: skip
    training = (*TRAINING, f"--seed={1000 * options.seed + 1}", f"--feature_cache.folder={options.features}", *flags)
    run("recipes/dpo.py", f"--feedback={votes}", f"--model={SHIPPED_MODEL}", f"--out={options.out / 'dpo'}", *training)
    evaluate_model(options, synth)


def run(script: str, *flags: str) -> None:
    """Run a script of the repository."""
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT, check=True)


def evaluate_model(options: Namespace, synth: SynthConfig) -> None:
    """Evaluate the trained model on the held-out clips of a run of mrDPO with these training clips."""
    dist.setup()
    # As a recipe loads models for training and evaluation.
    captioner = Captioner.load(
        options.out / "dpo" / "merged", placement=Placement(dtype="float32", attention="sdpa"), reader="pyav"
    )
    clips = render_clips(options.clips_dir, heldout_config(synth, clips=NUM_HELDOUT))
    cache = open_feature_cache(FeatureCacheConfig(options.features), captioner)
    (heldout,) = cache_features(captioner, clips, name="clips", cache=cache)
    judge = RuleJudge()
    result = evaluate(captioner, heldout, judge=judge, sampling=SampleConfig(), name="votes")
    write_evaluation(options.out / "heldout", result, judge=judge)
    write_json(options.out / "rates.json", asdict(result.rates))


if __name__ == "__main__":
    main()
