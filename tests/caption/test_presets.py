"""Presets and files of named prompts: those that come with the package, users' own, and what is wrong with a file."""

import pytest

from salmonn.batch.dataset import check_layout
from salmonn.caption.length import WordRange
from salmonn.caption.presets import DatasetLayout, load_preset, load_prompts, preset_names
from salmonn.caption.shape import CaptionShape
from salmonn.cli.shape_options import describe_presets


def test_all_presets_can_be_used():
    """Each says where its trainer's format is documented; `plain` is for no particular one."""
    assert {"hunyuan", "ltx2", "plain", "wan"} <= set(preset_names())
    for name in preset_names():
        preset = load_preset(name)
        assert preset.description and (preset.documented or name == "plain")
        assert all(address.startswith("https://") and says for address, says in preset.documented.items())
        CaptionShape(prompt=preset.prompt, words=WordRange.parse(preset.words) if preset.words else None)
        if preset.dataset:
            check_layout(preset.dataset)
        assert preset.export or preset.dataset
        assert f"{name}: {preset.description}\n" in describe_presets()


def test_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "words: 5-9\nexport: [txt, csv]\ndataset: {file: a.csv, columns: {v: '{path}'}}\navoid: [red hair]\n"
    )
    preset = load_preset(str(path))
    assert (preset.words, preset.export, preset.avoid) == ("5-9", ("txt", "csv"), ("red hair",))
    assert preset.dataset == DatasetLayout("a.csv", {"v": "{path}"}) and preset.prompt is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wrds: 5-9", "unknown field wrds in Preset"),
        ("words: 80", "Preset.words must be a valid string, got 80"),
        (
            "export: [doc]",
            "Preset.export[0] must be 'csv', 'parquet', 'datasets', 'webdataset', 'txt', 'srt' or 'vtt', got 'doc'",
        ),
        ("- a", "must contain names with values"),
        ("", "must contain names with values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_files_that_are_no_presets(tmp_path, content, message):
    path = tmp_path / "mine.yml"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        load_preset(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_presets_that_do_not_exist(tmp_path):
    names = ", ".join(preset_names())
    with pytest.raises(ValueError, match=f"there is no preset 'ltx3'; choose {names}, or a file of"):
        load_preset("ltx3")
    with pytest.raises(ValueError, match=r"none\.yaml: there is no such file"):
        load_preset(str(tmp_path / "none.yaml"))


def test_named_prompts(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("short: Briefly.\nlong-2:\n  prompt: At length.\n  words: 80-120\n")
    prompts = load_prompts(path)
    assert list(prompts) == ["short", "long-2"]
    assert (prompts["short"].prompt, prompts["long-2"].prompt) == ("Briefly.", "At length.")
    assert (prompts["short"].words, prompts["long-2"].words) == (None, "80-120")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a/b: x", "the name 'a/b' must consist of letters, digits, _ and -"),
        ("1: x", "the name 1 must consist of"),
        ("a: {words: 1-2}", "a: the prompt is missing"),
        ("a: {prompt: x, word: 1-2}", "a: unknown field word in CaptionSettings"),
        ("a: 5", "a: CaptionSettings must be"),
    ],
)
def test_files_that_are_no_named_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        load_prompts(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
