"""How the project's HTML is made: templates of jinja in which everything is escaped and nothing may be missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def load_template(path: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template by its file, with the filters that it calls by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,  # captions and events may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
