"""Presets: YAML files that say what captions a trainer of video generators expects, and in which files.

    preset = load_preset("ltx2")        # one of `preset_names()`, or the path of a user's own file

The files in `salmonn/presets/` come with the package, so that they work wherever it is installed; each says where the
trainer's format is documented. Files of named prompts (`load_prompts`) have the same settings under each name.
"""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from salmonn.files import parse_json
from salmonn.records import Modality

PRESETS = Path(__file__).parent.parent / "presets"
YAML_SUFFIXES = (".yaml", ".yml")

ExportFormat = Literal["csv", "parquet", "datasets", "webdataset", "txt", "srt", "vtt"]
Settings = TypeVar("Settings", bound="CaptionSettings")


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of a `CaptionShape` as text; None where another source decides.

    Args:
        prompt, template, prefix, suffix, trigger, include, avoid, language, refine: see `CaptionShape`.
        words: range such as "80-120", or "any".
    """

    prompt: str | None = None
    words: str | None = None
    include: tuple[str, ...] | None = None
    avoid: tuple[str, ...] | None = None
    language: str | None = None
    template: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    trigger: str | None = None
    refine: str | None = None


SETTING_NAMES = tuple(one.name for one in fields(CaptionSettings))


@dataclass(frozen=True)
class DatasetLayout:
    """A file that lists videos and captions for a trainer.

    Args:
        file: name of the file; its suffix (.json, .jsonl or .csv) selects the format.
        columns: template of each column, with the fields {path}, {caption}, {name}, {folder}, and the names of prompts.
    """

    file: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Preset(CaptionSettings):
    """What a trainer expects.

    Args:
        description: trainer and format, in one line.
        documented: what the trainer's documentation says, by its address.
        modality: what the model is given.
        export: formats of the files next to each video.
        dataset: file that lists all videos, if the trainer reads one.
    """

    description: str = ""
    documented: dict[str, str] = field(default_factory=dict)
    modality: Modality | None = None
    export: tuple[ExportFormat, ...] = ()
    dataset: DatasetLayout | None = None


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Load a preset by name, or a user's own by the path of its file, which ends in .yaml or .yml.

    Raises:
        ValueError: there is no such preset, or the file is not a preset.
    """
    if Path(name).suffix in YAML_SUFFIXES:
        return _parse(_read_yaml(Path(name)), Preset, where=name)
    if name not in preset_names():
        raise ValueError(
            f"there is no preset {name!r}; choose {', '.join(preset_names())}, or a file of your own that ends in .yaml"
        )
    return _parse(_read_yaml(PRESETS / f"{name}.yaml"), Preset, where=f"preset {name}")


def load_prompts(path: Path) -> dict[str, CaptionSettings]:
    """Load named prompts: a YAML mapping of names to prompts, or to settings that include a prompt.

    Raises:
        ValueError: the file is not such a mapping, or a name cannot be part of a file name.
    """
    prompts = {}
    for name, value in _read_yaml(path).items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(
                f"{path}: the name {name!r} must consist of letters, digits, _ and -, as it is part of file names"
            )
        settings = _parse(
            {"prompt": value} if isinstance(value, str) else value, CaptionSettings, where=f"{path}, {name}"
        )
        if settings.prompt is None:
            raise ValueError(f"{path}, {name}: the prompt is missing; add prompt: and its text")
        prompts[name] = settings
    return prompts


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text ({error})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must contain names with values, such as prompt: Describe the clip.")
    return content


def _parse(value: Any, settings_type: type[Settings], *, where: str) -> Settings:
    try:
        return parse_json(json.dumps(value, default=str), settings_type)  # YAML also has dates
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
