"""`salmonn models`: sizes and memory are those of the dry run, and the README has the same."""

import json
import re
from pathlib import Path

import pytest

from salmonn.cli.models import _measure
from salmonn.model.families import PUBLISHED_CONFIGS
from salmonn.model.families.catalog import SEE_ITS_PAGE, known_models
from salmonn.model.memory import GIB

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_chosen_models_in_a_table(call):
    code, out, _ = call("models", "VL-2B", "d-orca")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        ["Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl", "video", "2.13 B"],
        ["tsinghua-ee/D-ORCA-8B-0210", "d-orca", "video+sound", "9.85 B"],
    ]


def test_json_lines_of_captioners_of_one_base(call):
    """They share parameters and memory; weights in bfloat16 are most of the latter."""
    code, out, _ = call("models", "asid-captioner-3b", "UGC-Video", "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and (first["licence"], second["licence"]) == ("apache-2.0", "mit")
    assert first["parameters"] == second["parameters"] and first["gpu_bytes"] == second["gpu_bytes"]
    assert 2 * first["parameters"] + GIB < first["gpu_bytes"] < 2 * first["parameters"] + 6 * GIB


def test_an_unknown_name_is_one_sentence(call):
    code, _, error = call("models", "gpt")
    assert code == 2 and "no known model or family has gpt in its name" in error


def test_every_known_model_has_the_config_of_a_family():
    models = known_models()
    assert {model.base for model in models} == PUBLISHED_CONFIGS.keys()
    assert len({model.name for model in models}) == len(models)
    assert {model.licence for model in models} > {SEE_ITS_PAGE, "apache-2.0"}


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-8B-Instruct", "tsinghua-ee/D-ORCA-8B-0210"])
def test_the_readme_states_the_computed_memory(name):
    _, gpu_bytes = _measure(name)
    row = next(line for line in README.splitlines() if f"`{name}`" in line and line.startswith("|"))
    assert re.search(rf"\| {gpu_bytes / GIB:.0f} \|", row)
