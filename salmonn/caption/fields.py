"""Templates of prompts and captions with fields that are filled in for each clip, such as "{trigger}, {caption}".

A field is a name in braces. Other braces are plain text, so that a prompt may contain JSON; `{{name}}` stands for
`{name}` itself.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

CLIP_FIELDS = ("name", "folder", "duration", "sidecar")  # what is known about a clip before it is captioned
SIDECAR_SUFFIX = ".txt"

_FIELD = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


def find_fields(template: str) -> set[str]:
    """Return the names of the fields in a template."""
    return {match[2] for match in _FIELD.finditer(template) if match[2]}


def has_fields(text: str) -> bool:
    """Return whether a text has fields, or braces that stand for those of a field."""
    return _FIELD.search(text) is not None


def check_template(template: str, *, what: str, known: Collection[str], needed: str = "") -> None:
    """Raise a ValueError for a template that is empty, has an unknown field, or lacks a needed one.

    Args:
        template: the template.
        what: its name in the message, such as "--template".
        known: names of the fields that it may contain.
        needed: name of the field that it must contain, if any.
    """
    if not template.strip():
        raise ValueError(f"{what} is empty; give it a text, or leave it out")
    if unknown := sorted(find_fields(template) - set(known)):
        fields = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(
            f"{what} has the unknown field {{{unknown[0]}}}; the fields are {fields} (for the text itself, write "
            f"{{{{{unknown[0]}}}}})"
        )
    if needed and needed not in find_fields(template):
        raise ValueError(f"{what} lacks {{{needed}}}: without it, all clips would get the same text")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace the fields of a template by their values; braces in the values stay as they are."""
    return _FIELD.sub(lambda match: f"{{{match[1]}}}" if match[1] else values[match[2]], template)


def clip_fields(names: Collection[str], path: Path, *, seconds: float, is_local: bool = True) -> dict[str, str]:
    """Return the values of fields for a clip; only those that are named, since {sidecar} needs a file.

    Args:
        names: names of fields; those that are not `CLIP_FIELDS` are ignored.
        path: video or audio file.
        seconds: length of the clip.
        is_local: whether the file is on this machine, and not remote or in an archive.

    Raises:
        ValueError: the sidecar file is missing, empty or not text, or the clip is not local and cannot have one.
    """
    if "sidecar" in names and not is_local:
        raise ValueError("{sidecar} is a text file next to a local video; download the video, or leave out {sidecar}")
    values = {"name": path.stem, "folder": path.absolute().parent.name, "duration": f"{round(seconds, 1):g}"}
    if "sidecar" in names:
        values["sidecar"] = read_sidecar(path)
    return {name: value for name, value in values.items() if name in names}


def read_sidecar(path: Path) -> str:
    """Return the text of the .txt file next to a clip: clip.mp4.txt if it exists, or else clip.txt."""
    named = path.with_name(path.name + SIDECAR_SUFFIX)
    sidecar = named if named.is_file() else path.with_suffix(SIDECAR_SUFFIX)
    try:
        text = sidecar.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as error:
        raise ValueError(f"{{sidecar}} needs {sidecar.name} next to the clip, and there is none") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{sidecar} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{sidecar} cannot be read ({error.strerror})") from error
    if not text:
        raise ValueError(f"{sidecar} is empty; write a text into it, or delete it and leave out {{sidecar}}")
    return text
