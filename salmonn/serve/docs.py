"""The page /docs: the OpenAPI schema as a reference to read, without scripts and without requests to other hosts."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from salmonn.templates import load_template

_TEMPLATE = Path(__file__).parent / "docs.html.jinja"
_METHODS = ("get", "post", "delete")
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "maxItems": "at most (items)"}


@dataclass(frozen=True)
class Field:
    """A parameter of a path, a query or a body; `kind` is the type of its value in words."""

    name: str
    kind: str
    description: str
    required: bool
    where: str


@dataclass(frozen=True)
class Operation:
    """A method of a path.

    Args:
        method, path, summary, description: as in the schema.
        media_type: of the body; "" without one.
        fields: its parameters.
    """

    method: str
    path: str
    summary: str
    description: str
    media_type: str
    fields: tuple[Field, ...]


def render_docs(schema: dict[str, Any]) -> str:
    """Return the page.

    Args:
        schema: OpenAPI schema of a server.
    """
    operations = [
        _to_operation(method.upper(), path, operations[method], schema)
        for path, operations in schema["paths"].items()
        for method in _METHODS
        if method in operations
    ]
    return load_template(_TEMPLATE, code=_code).render(info=schema["info"], operations=operations)


def _to_operation(method: str, path: str, operation: dict[str, Any], schema: dict[str, Any]) -> Operation:
    fields = [
        Field(one["name"], _kind(one["schema"], schema), "", one.get("required", False), one["in"])
        for one in operation.get("parameters", [])
    ]
    contents: dict[str, Any] = operation.get("requestBody", {}).get("content", {})
    media_type = next(iter(contents), "")
    inner: dict[str, Any] = contents[media_type]["schema"] if contents else {}
    fields += [
        Field(name, _kind(one, schema), one.get("description", ""), name in inner.get("required", ()), "body")
        for name, one in inner.get("properties", {}).items()
    ]
    description = operation.get("description", "")
    return Operation(method, path, operation.get("summary", ""), description, media_type, tuple(fields))


def _kind(one: dict[str, Any], root: dict[str, Any]) -> str:
    """Return the type of a value in words."""
    if "$ref" in one:
        found: Any = root
        for part in one["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return f"object ({', '.join(found.get('properties', {}))})"
    if "anyOf" in one:
        return " or ".join(_kind(choice, root) for choice in one["anyOf"] if choice.get("type") != "null")
    if "const" in one or "enum" in one:
        return " or ".join(f"`{value}`" for value in one.get("enum", [one.get("const")]))
    if one.get("type") == "array":
        return f"list of: {_kind(one.get('items', {}), root)}"
    limits = ", ".join(f"{words} {one[name]:g}" for name, words in _LIMITS.items() if name in one)
    return one.get("type", "") + (f", {limits}" if limits else "")


def _code(text: str) -> Markup:
    """Escape a text, and format text between backquotes as code."""
    parts = escape(text).split("`")
    return Markup("".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts)))
