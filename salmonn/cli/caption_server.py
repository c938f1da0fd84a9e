"""Options of `salmonn caption` for captioning through a server in place of a local model."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import Namespace

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.server_options import ServerInput, ServerOptions
from salmonn.config import MAY_CHANGE, FlagParser
from salmonn.records import read_json

if TYPE_CHECKING:
    from salmonn.batch.ledger import Ledger
    from salmonn.caption.server import ServerCaptioner

_OPTIONS = {field.name: field for field in fields(ServerOptions)}
# Not the address: the same model may be served elsewhere when the run is resumed.
SERVER_SETTINGS = tuple(
    name for name, field in _OPTIONS.items() if field.metadata != MAY_CHANGE and name not in ("server", "allow_deaf")
)
# Options of a local model, with the values that leave them unset.
_LOCAL_OPTIONS = {
    "model": None, "adapter": None, "published_positions": False, "device": None, "device_map": None, "dtype": "auto",
    "attention": "auto", "bits": None, "batch_size": None, "engine": "local", "ray_actors": None,
}  # fmt: skip


def add_server_options(parser: FlagParser) -> None:
    """Add the server's address, model and limits."""
    group = parser.add_argument_group("Server instead of a local model")
    group.add_class_arguments(ServerOptions, as_group=False, skip={"allow_deaf"})
    group.add_argument("--allow_deaf", action="store_true", help="caption even if the model does not hear")


def server_options(values: Namespace) -> ServerOptions:
    """Return the server that the flags describe.

    Raises:
        ValueError: a value is invalid, has no effect beside the others, or is missing.
    """
    options = ServerOptions(**{name: values[name] for name in _OPTIONS})
    if options.server is None:
        if wrong := [name for name, field in _OPTIONS.items() if values[name] != field.default]:
            raise ValueError(f"{_flag(wrong[0])} has no effect without --server")
        return options
    if wrong := [name for name, unset in _LOCAL_OPTIONS.items() if values[name] != unset]:
        raise ValueError(f"{_flag(wrong[0])} is for local models; remove it, or remove --server")
    if options.server_model is None:
        raise ValueError("--server needs the name of a model on it: pass --server-model")
    return options


def server_settings(values: Namespace) -> dict[str, object]:
    """Return the settings that captions of a server depend on."""
    return {name: values[name] for name in SERVER_SETTINGS}


def keep_server_input(values: Namespace, job_file: Path) -> None:
    """Send clips as an earlier run did: what `auto` chose for it is among its settings."""
    if values.server and values.server_input == "auto" and not values.overwrite and job_file.exists():
        chosen = read_json(job_file).get("server_input")
        values.server_input = chosen if chosen in get_args(ServerInput) else "auto"


def load_server(values: Namespace, ledger: "Ledger") -> "ServerCaptioner":
    """Connect to the server that the flags describe, and record what it is sent; raises as `connect_captioner`."""
    from salmonn import dist
    from salmonn.caption.server_connection import connect_captioner

    if dist.world_size() > 1:
        raise ValueError("--server needs one process, whose requests run concurrently: start it without torchrun")
    parts = (values.start, values.end, values.segments, values.frames)
    captioner = connect_captioner(
        server_options(values),
        modality=values.modality,
        cuts_files=any(part is not None for part in parts),
        max_new_tokens=values.max_new_tokens,
        reader=values.reader,
    )
    speech = () if values.context else None  # refused before the first clip, not at the first one with a transcript
    captioner.read_spec(CaptionRequest(Path(), values.prompt, speech=speech), values.shape)
    values.server_input = captioner.input
    ledger.update_job(server_settings(values))
    if not values.quiet:
        sys.stderr.write(f"clips are sent to {captioner.name} as {captioner.input}\n")
    return captioner


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
