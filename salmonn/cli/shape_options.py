"""Flags of `salmonn caption` for the shape of captions: presets, named prompts, length, words, templates, refining."""

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.caption.presets import CaptionSettings, DatasetLayout, Preset
    from salmonn.caption.shape import CaptionShape, Shape

# Settings of the shape that captions depend on. Those of a preset are resolved before they are compared. The same text
# model may be served at another address when a run is resumed.
SHAPE_SETTINGS = (
    "words", "include", "avoid", "language", "template", "prefix", "suffix", "trigger", "refine", "refine_model",
    "prompts",
)  # fmt: skip


class _PresetAction(argparse.Action):
    """Stores the preset; `--preset list` prints all presets and ends."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values == "list":
            sys.stdout.write(describe_presets())
            parser.exit()
        setattr(namespace, self.dest, values)


def describe_presets() -> str:
    """Return what each preset is for and where its format is documented."""
    from salmonn.caption.presets import PRESETS, load_preset, preset_names

    lines = []
    for name in preset_names():
        preset = load_preset(name)
        lines.append(f"{name}: {preset.description}\n")
        lines += [f"    {address}\n        {says}\n" for address, says in preset.documented.items()]
    return "".join(lines) + f"The files are in {PRESETS}; copy one to make your own.\n"


def add_shape_options(parser: FlagParser) -> None:
    """Add the flags to a parser."""
    from salmonn.caption.presets import preset_names

    group = parser.add_argument_group(
        "Shape of the captions",
        f"Presets for trainers of video generators: {', '.join(preset_names())}; --preset list describes them. "
        "Prompts, templates, prefix and suffix may have the fields {name}, {folder}, {duration} (seconds) and "
        "{sidecar} (the text of the .txt file next to the clip).",
    )
    presets = "name of a preset, or your own YAML file; other flags override it (list: describe all presets)"
    group.add_argument("--preset", action=_PresetAction, default=None, metavar="NAME", help=presets)
    prompts = "YAML file of named prompts, which are all answered for each clip (captions: {name: text})"
    group.add_argument("--prompts", type=Path | None, default=None, help=prompts)
    words = "number of words, such as 80-120: asked again if it is wrong, then cut at the end of a sentence (any: off)"
    group.add_argument("--words", type=str, default=None, help=words)
    include = "words or phrases that the caption should have; shaping.missing_words lists those it lacks"
    group.add_argument("--include", nargs="+", type=str, default=None, help=include)
    avoid = "words or phrases that the caption should not have; shaping.unwanted_words lists those it has"
    group.add_argument("--avoid", nargs="+", type=str, default=None, help=avoid)
    group.add_argument("--language", type=str, default=None, help="language to ask for: a code such as de")
    template = "text of the caption, such as '{trigger}, {caption}' (the default with --trigger)"
    group.add_argument("--template", type=str, default=None, help=template)
    group.add_argument("--trigger", type=str, default=None, help="trigger word of a LoRA, {trigger} in templates")
    group.add_argument("--prefix", type=str, default=None, help="text to put before the caption, as it is")
    group.add_argument("--suffix", type=str, default=None, help="text to put after the caption, as it is")
    refine = "prompt of a second stage that rewrites the first caption, {caption}"
    group.add_argument("--refine", type=str, default=None, help=refine)
    server = "OpenAI-compatible server of a text model for --refine, such as http://localhost:8000/v1"
    group.add_argument("--refine_server", type=str, default=None, help=server)
    key = "name of the environment variable with that server's API key (default: see --server-api-key-env)"
    group.add_argument("--refine_api_key_env", type=str | None, default=None, help=key)
    group.add_argument("--refine_model", type=str, default=None, help="name of the text model on its server")
    dataset = "file that lists videos and captions for a trainer: .json, .jsonl or .csv, in the preset's columns"
    group.add_argument("--dataset", type=Path | None, default=None, help=dataset)


def resolve_shape(values: Namespace) -> None:
    """Apply the preset and check the shape; sets `values.shape` and `values.dataset_layout`, both possibly None.

    Raises:
        ValueError: a preset, template or range cannot be used.
    """
    from salmonn.caption.presets import SETTING_NAMES, Preset, load_preset, load_prompts

    preset = load_preset(values.preset) if values.preset else Preset()
    if values.prompt is not None and values.prompts is not None:
        raise ValueError("--prompt and --prompts both say what to ask for; use one of them")
    for name in SETTING_NAMES:
        given, default = values[name], getattr(preset, name)
        values[name] = (list(default) if isinstance(default, tuple) else default) if given is None else given
    values.modality = values.modality or preset.modality or "both"
    values.export = [*values.export, *(name for name in preset.export if name not in values.export)]
    values.words = None if values.words == "any" else values.words
    named = None if values.prompts is None else load_prompts(values.prompts)
    values.shape = _make_shape(values, named)
    values.dataset_layout = _dataset_layout(values, preset)
    if named is not None:
        values.prompts = {name: _without_none(asdict(one)) for name, one in named.items()}
    _check_files(values)


def _make_shape(values: Namespace, named: "dict[str, CaptionSettings] | None") -> "Shape | None":
    from salmonn.caption.fields import has_fields
    from salmonn.caption.presets import SETTING_NAMES, CaptionSettings
    from salmonn.caption.shape import ONLY_CAPTION, CaptionShape, Shape
    from salmonn.caption.text_model import text_model_config

    has_text_model = values.refine_server is not None or values.refine_model is not None
    if values.refine_api_key_env is not None and not has_text_model:
        raise ValueError("--refine-api-key-env is for the server of a text model; add --refine-model, or remove it")
    if values.refine_server is not None and not values.refine_model:
        raise ValueError("--refine-server needs the name of a model on it: add --refine-model")
    given: dict[str, Any] = {name: values[name] for name in SETTING_NAMES}
    given |= {name: tuple(given[name]) for name in ("include", "avoid") if given[name] is not None}
    common = CaptionSettings(**given)
    if named is None:
        one = _caption_shape(common, has_text_model=has_text_model)
        if one == CaptionShape(prompt=one.prompt) and not has_text_model and not has_fields(one.prompt or ""):
            return None
        shapes = {ONLY_CAPTION: one}
    else:
        shapes = {}
        for name, settings in named.items():
            own = replace(common, **_without_none(asdict(settings)))
            try:
                shapes[name] = _caption_shape(own, has_text_model=has_text_model)
            except ValueError as error:
                raise ValueError(f"{values.prompts}, {name}: {error}") from error
    if has_text_model and not any(one.refine for one in shapes.values()):
        raise ValueError("--refine-server and --refine-model belong to a second stage; give its prompt with --refine")
    text_model = None
    if has_text_model:
        text_model = text_model_config(
            url=values.refine_server, model=values.refine_model, api_key_env=values.refine_api_key_env
        )
    shortest = max((one.words.minimum for one in shapes.values() if one.words), default=0)
    if values.max_new_tokens is not None and values.max_new_tokens < shortest:
        raise ValueError(
            f"--max-new-tokens {values.max_new_tokens} is too small for {shortest} words; increase it or leave it out"
        )
    return Shape(shapes, is_named=named is not None, text_model=text_model)


def _caption_shape(settings: "CaptionSettings", *, has_text_model: bool) -> "CaptionShape":
    from salmonn.caption.length import WordRange
    from salmonn.caption.shape import CaptionShape

    if settings.trigger is not None and not settings.trigger.strip():
        raise ValueError("the trigger is empty; give a word, such as --trigger ohwx, or leave it out")
    words = None if settings.words in (None, "any") else WordRange.parse(settings.words or "")
    return CaptionShape(
        prompt=settings.prompt,
        words=words,
        include=settings.include or (),
        avoid=settings.avoid or (),
        language=settings.language,
        template=settings.template,
        prefix=settings.prefix or "",
        suffix=settings.suffix or "",
        trigger=settings.trigger or "",
        refine=settings.refine,
        by_text_model=has_text_model and settings.refine is not None,
    )


def _dataset_layout(values: Namespace, preset: "Preset") -> "DatasetLayout | None":
    """Return the layout of the dataset file, with its path instead of its name."""
    from salmonn.batch.dataset import DEFAULT_COLUMNS, check_layout
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.presets import DatasetLayout

    layout = preset.dataset
    if values.dataset is not None:
        layout = DatasetLayout(str(values.dataset), layout.columns if layout else DEFAULT_COLUMNS)
    elif layout is not None:
        layout = replace(layout, file=str(_common_folder(values) / layout.file))
    if layout is None:
        return None
    check_layout(layout, names=list(values.shape.captions) if values.shape and values.shape.is_named else [])
    if values.segments is not None and values.fuse is None:
        raise ValueError(
            "a dataset has one caption for each file, and --segments makes several; add --fuse, which makes one of them"
        )
    if str(values.out) == "-":
        raise ValueError(f"the dataset {layout.file} needs captions in a separate file: --out captions.jsonl")
    tables = {".csv", ".parquet"} & {values.out.suffix, *(f".{name}" for name in values.export)}
    own = {values.out.with_suffix(suffix).resolve() for suffix in (".jsonl", *tables)}
    if Path(layout.file).resolve() in own or LedgerFiles(values.out.with_suffix(".jsonl")).owns(Path(layout.file)):
        raise ValueError(f"the dataset {layout.file} would replace another file of this run; choose another --dataset")
    return layout


def _common_folder(values: Namespace) -> Path:
    """Return the folder that contains all clips."""
    if values.list is not None or not values.paths:
        cause = "the clips come from a list" if values.list is not None else "no folder is named"
        raise ValueError(f"{cause}, so it is unclear where the dataset file belongs; choose a path with --dataset")
    folders = [path if path.is_dir() else path.parent for path in map(Path, values.paths)]
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.absolute() for folder in folders]))


def _check_files(values: Namespace) -> None:
    """Raise a ValueError if the files that a run writes would change what it reads: the texts next to the clips."""
    if values.shape is None or "sidecar" not in values.shape.fields:
        return
    if values.replace_subtitles:
        raise ValueError("{sidecar} reads the text files that --replace-subtitles overwrites; use it without")
    if "txt" in values.export and not values.shape.is_named and values.subtitle_dir is None:
        raise ValueError(
            "{sidecar} reads the text files that txt would write; write them to another folder with --subtitle-dir"
        )


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
