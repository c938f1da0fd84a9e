"""Figures of a run that is going on, as JSON lines and as TensorBoard events: `tensorboard --logdir RUN` shows them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from salmonn.records import write_text
from salmonn.train.run_log import STEPS_NAME, RunSummary, read_steps

ROUNDS_NAME = "rounds.jsonl"


class StepLog:
    """Each step's figures in `steps.jsonl` and TensorBoard events beside it. Rank 0 alone makes one.

    Args:
        folder: of the stage; made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STEPS_NAME
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None

    def resume(self, first: int) -> None:
        """Open the log before the stage's step `first`, of a new one 0; call it before any step is logged.

        What a killed run wrote of this step and later ones is dropped, since they are done again: from the file at
        once, from TensorBoard by a mark that it goes by when it reads.
        """
        kept = [figures for figures in read_steps(self.path) if figures["step"] < first]
        write_text(self.path, "".join(json.dumps(figures) + "\n" for figures in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self.path.parent), purge_step=first)

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one step, so that it outlives this process."""
        assert self._file and self._events, "resume() opens the log"
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """End both files."""
        assert self._file and self._events, "resume() opens the log"
        self._file.close()
        self._events.close()


def log_rounds(folder: Path, summary: RunSummary) -> None:
    """Write all stages' rates, as fractions, and KL in nats a token: a line a stage in `rounds.jsonl`, and for
    TensorBoard each against its stage's number, SFT's being 0.

    What was written before, also by a run that was killed, is replaced or marked as void, so that this may be called
    whenever a stage is measured.
    """
    lines = ({"stage": name, **asdict(rates), "kl": summary.kl.get(name)} for name, rates in summary.stages.items())
    write_text(folder / ROUNDS_NAME, "".join(json.dumps(line) + "\n" for line in lines))
    with SummaryWriter(str(folder), purge_step=0) as events:
        for number, figures in enumerate(summary.figures.values()):
            for title, value in figures.items():
                if value is not None:
                    events.add_scalar(title, value, number)
