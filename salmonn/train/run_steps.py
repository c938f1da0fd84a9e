"""Steps of a run and the settings that each depends on: what a resumed run keeps, refuses and redoes.

The run folder's `settings.json` records the settings that every step was made with. On resume they are compared with
the current ones. A setting that no existing result depends on is free to change. Otherwise the run is refused, unless
`--redo-from STEP` says which results to keep: those of earlier steps, regardless of their settings, and those of later
steps that agree with the current settings. The flag may stay in the command: a resumed run deletes nothing twice.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from salmonn.config import resume_values
from salmonn.files import read_json, write_json

log = logging.getLogger(__name__)
SETTINGS_NAME = "settings.json"
PLAN_KEY = "plan"  # in this file, next to the names of the steps: files and needs of all steps, also of earlier plans
# Files of a training step, in the folder of its stage.
TRAINING_FILES = ("checkpoints", "steps.jsonl", "events.out.tfevents.*", "reference_logps.json", "start_logps.json")
MERGED_FILES = (*TRAINING_FILES, "adapter", "merged", "rounding.json")

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of a run, whose results are files.

    Args:
        name: name for `--redo-from`: the folder of the stage and the result, such as "round_2/pairs".
        settings: dotted name -> JSON value of what the results depend on besides those of earlier steps.
        files: patterns of its files below the run folder, of unfinished results too.
        result: file whose existence means that the step is complete.
        needs: names of the steps that it is made from.
    """

    name: str
    settings: Settings
    files: tuple[str, ...]
    result: str
    needs: tuple[str, ...] = ()

    def find_files(self, folder: Path) -> list[Path]:
        """Return what exists of the step."""
        return sorted(path for pattern in self.files for path in folder.glob(pattern))


def flat_settings(config: Any) -> dict[str, Any]:
    """Return dotted name -> JSON value of all fields of a config that are not marked as `MAY_CHANGE`."""
    return dict(_flatten(resume_values(config)))


def _flatten(values: Namespace, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in vars(values).items():
        if isinstance(value, Namespace):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value, default=str))


def choose_settings(settings: Settings, *names: str) -> dict[str, Any]:
    """Return the settings with these names, or of these groups ("fit" for all of "fit.steps", ...)."""
    return {key: value for key, value in settings.items() if any(f"{key}.".startswith(f"{name}.") for name in names)}


def fingerprint(records: Iterable[Any]) -> str:
    """Return a short hash of records (dataclasses) or JSON values, which stands for them in the settings."""
    values = [asdict(one) if is_dataclass(one) and not isinstance(one, type) else one for one in records]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def open_steps(folder: Path, steps: Sequence[Step], *, redo_from: str | None = None) -> None:
    """Compare the settings of existing results with the current ones, delete what is to be redone, and record them.

    Args:
        folder: run folder.
        steps: all steps of the run, each after those that it needs.
        redo_from: name of a step, or of a stage's folder for its first step.

    Raises:
        ValueError: results depend on a setting that has changed, or there is no such step.
    """
    path = folder / SETTINGS_NAME
    recorded: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    # A step that this configuration lacks may come back with another one. Until then it counts as one of the last.
    absent = [
        Step(name, recorded[name], tuple(step["files"]), step["result"], tuple(step["needs"]))
        for name, step in recorded.pop(PLAN_KEY, {}).items()
        if name not in {step.name for step in steps}
    ]
    existing = _find_existing(folder, [*steps, *absent])
    changes = {step.name: _describe_changes(recorded.get(step.name, {}), step.settings) for step in existing}
    changed = [step for step in existing if changes[step.name]]
    if changed and redo_from is None:
        raise ValueError(_describe_refusal(folder, steps, changed, changes=changes))
    first = _find_step(steps, redo_from) if redo_from else 0
    redone = {step.name for step in changed if steps.index(step) >= first}  # absent steps have not changed
    for step in changed:
        if step.name not in redone:
            log.warning("keeping %s, which was made with %s", step.name, changes[step.name])
    for step in [*steps, *absent]:
        if redone & set(step.needs):
            redone.add(step.name)
    for step in reversed(existing):  # the last first, in case of a kill
        if step.name in redone:
            log.warning("deleting %s, to make it again", step.name)
            _delete(step.find_files(folder))
    kept = {step.name for step in existing} - redone
    plan = {one.name: {"files": one.files, "result": one.result, "needs": one.needs} for one in [*steps, *absent]}
    made = {step.name: dict(step.settings) for step in steps if step.name not in kept}
    write_json(path, recorded | made | {PLAN_KEY: plan})


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _find_existing(folder: Path, steps: Sequence[Step]) -> list[Step]:
    """Return the steps that have files, or that a step with files was made from."""
    names = set[str]()
    for step in reversed(steps):
        if step.name in names or step.find_files(folder):
            names |= {step.name, *step.needs}
    return [step for step in steps if step.name in names]


def _find_step(steps: Sequence[Step], name: str) -> int:
    """Return the number of a step, or of the first one of a stage."""
    for number, step in enumerate(steps):
        if step.name == name or step.name.startswith(f"{name}/"):
            return number
    raise ValueError(f"redo_from: there is no step {name}; this run has {', '.join(step.name for step in steps)}")


def _describe_changes(before: Settings, now: Settings) -> str:
    """Return the differences in words; "" if there is none."""
    return ", ".join(
        f"{name} {_to_text(before.get(name))} (now {_to_text(now.get(name))})"
        for name in sorted({**before, **now})
        if before.get(name) != now.get(name)
    )


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _describe_refusal(
    folder: Path, steps: Sequence[Step], changed: Sequence[Step], *, changes: Mapping[str, str]
) -> str:
    first = changed[0]
    text = (
        f"{folder / first.name} was made with another configuration: {changes[first.name]}. Set it back, choose "
        f"another --out, or pass --redo-from {first.name} to redo that and what depends on it"
    )
    finished = [step for step in changed if (folder / step.result).is_file()]
    if finished:
        later = steps[steps.index(finished[-1]) + 1 :]
        unfinished = [step.name for step in later if not (folder / step.result).is_file()]
        text += "".join(f", or --redo-from {name} to keep all steps before that" for name in unfinished[:1])
    return text
