"""Templates in Jinja, with undefined names as errors; in all but Markdown (.md.jinja), values are escaped for HTML."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def load_template(path: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """Load a template from a file, with the filters that it uses by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=not path.name.endswith(".md.jinja"),  # captions and events may contain any text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
