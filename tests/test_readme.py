"""Files in README and docs exist, links resolve, and every module has a docstring."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    path
    for folder in ("salmonn", "recipes", "demo", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def test_named_files_exist():
    paths = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"\b(?:salmonn|recipes|demo|tools|tests|docs)/[\w/]+\.\w+\b", page.read_text("utf-8"))
    }
    assert len(paths) > 25
    assert not [(page, path) for page, path in sorted(paths) if not (ROOT / path).exists()]


def test_links_resolve():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
        if not target.startswith("http")
    ]
    assert len(links) > 15
    assert not [(page.name, target) for page, target in links if not (page.parent / target).exists()]


def test_every_module_has_a_docstring():
    assert len(MODULES) > 60
    assert not [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]


def test_design_describes_every_package():
    packages = [path.parent for path in (ROOT / "salmonn").glob("*/__init__.py")]
    assert len(packages) > 8
    assert not [path.name for path in packages if f"`salmonn/{path.name}/`" not in DESIGN and path.name != "salmonn"]
