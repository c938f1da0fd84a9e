"""The README has one line for each file of the project, and no line for a file that is gone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted(
    str(path.relative_to(ROOT))
    for room in ("salmonn", "recipes", "demo", "tools")
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py"
)


def test_there_are_files():
    assert len(FILES) > 25 and "salmonn/model/network.py" in FILES


@pytest.mark.parametrize("path", FILES)
def test_each_file_has_a_line(path):
    lines = [line for line in README.splitlines() if re.match(rf"\W*{re.escape(path)}\W+\w", line)]
    assert len(lines) == 1, f"README.md has {len(lines)} lines that begin with {path} and say what it does"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:salmonn|recipes|demo|tools|tests)/[\w/]+\.\w+", README))))
def test_each_named_file_is_there(path):
    assert (ROOT / path).is_file()


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if not target.startswith("http")]
    assert targets and not [target for target in targets if not (ROOT / target).exists()]
