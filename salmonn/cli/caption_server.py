"""Options of `salmonn caption` for captioning through a server instead of a local model."""

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import Namespace

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.server_options import KEY_FLAG, ServerInput, ServerOptions
from salmonn.caption.text_model import REFINE_KEY_FLAG
from salmonn.cli.fuse_options import FUSE_KEY_FLAG, fuse_server_config
from salmonn.config import MAY_CHANGE, FlagParser
from salmonn.files import read_json
from salmonn.score.api_keys import find_api_key
from salmonn.score.config import LLMConfig

if TYPE_CHECKING:
    from salmonn.batch.ledger import Ledger
    from salmonn.caption.server import ServerCaptioner

SPEND_CAPS = ("max_requests", "max_tokens_total")
OWN_SOFTWARE = "salmonn serve"
_OPTIONS = {field.name: field for field in fields(ServerOptions)}
# Not the address: the same model may be served elsewhere when the run is resumed.
SERVER_SETTINGS = tuple(
    name for name, field in _OPTIONS.items() if field.metadata != MAY_CHANGE and name not in ("server", "allow_deaf")
)
# Options of a local model, with the values that leave them unset.
_LOCAL_OPTIONS = {
    "model": None, "adapter": None, "published_positions": False, "device": None, "device_map": None, "dtype": "auto",
    "attention": "auto", "bits": None, "batch_size": None, "engine": "local", "ray_actors": None,
    "vllm_args": None,
}  # fmt: skip


def add_server_options(parser: FlagParser) -> None:
    """Add the server's address, model and limits."""
    group = parser.add_argument_group("Server instead of a local model")
    group.add_class_arguments(ServerOptions, as_group=False, skip={"allow_deaf"})
    group.add_argument("--allow_deaf", action="store_true", help="caption even if the model does not hear")


def server_options(values: Namespace) -> ServerOptions:
    """Return the server that the flags describe.

    Raises:
        ValueError: a value is invalid, has no effect with the others, or is missing.
    """
    options = ServerOptions(**{name: values[name] for name in _OPTIONS})
    if options.server is None:
        changed = [name for name, field in _OPTIONS.items() if values[name] != field.default]
        if wrong := [name for name in changed if name not in SPEND_CAPS]:
            raise ValueError(f"{_flag(wrong[0])} has no effect without --server")
        if changed and values.refine_model is None and values.fuse_model is None:
            raise ValueError(f"{_flag(changed[0])} has no effect without --server, or the server of a text model")
        return options
    if wrong := [name for name, unset in _LOCAL_OPTIONS.items() if values[name] != unset]:
        raise ValueError(f"{_flag(wrong[0])} is for local models; remove it, or remove --server")
    if options.server_model is None:
        raise ValueError("--server needs the name of a model on it: pass --server-model")
    return options


def add_budget(values: Namespace) -> None:
    """Set `values.budget`, the budget of all servers of a run, and give it to the shape of the captions.

    Raises:
        ValueError: an API key is not set, or a cap would not be one: processes of a cluster count by themselves.
    """
    values.budget = server_options(values).budget()
    if values.engine != "ray":
        if values.shape is not None and values.shape.text_model is not None:
            values.shape = replace(values.shape, budget=values.budget)
    elif values.refine_model and (given := [name for name in SPEND_CAPS if values[name] is not None]):
        raise ValueError(f"{_flag(given[0])} cannot be kept by the actors of a cluster; use it without --engine ray")
    for config, flag in _servers(values):
        find_api_key(config, flag=flag)


def report_spending(values: Namespace, *, is_failed: bool = False) -> None:
    """Print what the run has spent on servers, as far as this process knows.

    Args:
        values: options of the run.
        is_failed: whether an error ended the run; then requests without any tokens, which cost nothing, are left out.
    """
    if is_failed and not any(spent.tokens for spent in values.budget.spent.values()):
        return
    if spent := values.budget.describe():
        sys.stderr.write(f"requests to servers: {spent}\n")
    if values.engine == "ray" and values.refine_model:
        sys.stderr.write(f"requests of the cluster's actors to {values.refine_model} are not counted\n")


def require_one_process(values: Namespace) -> None:
    """Raise a ValueError where each process would spend its own budget."""
    from salmonn import dist

    if dist.world_size() > 1 and (given := [name for name in SPEND_CAPS if values[name] is not None]):
        raise ValueError(f"{_flag(given[0])} counts the requests of one process; start it without torchrun")


def _servers(values: Namespace) -> "Iterator[tuple[LLMConfig, str]]":
    """Yield the servers of a run, each with the flag for its API key."""
    if values.server is not None:
        yield server_options(values).llm_config(), KEY_FLAG
    if values.shape is not None and values.shape.text_model is not None:
        yield values.shape.text_model, REFINE_KEY_FLAG
    if values.fuse_model is not None:
        yield fuse_server_config(values), FUSE_KEY_FLAG


def server_settings(values: Namespace) -> dict[str, object]:
    """Return the settings that captions of a server depend on."""
    return {name: values[name] for name in (*SERVER_SETTINGS, "server_software")}


def keep_server_input(values: Namespace, job_file: Path) -> None:
    """Send clips as an earlier run did: what `auto` chose, and what the server was, are among its settings."""
    values.server_software = None
    if values.server and not values.overwrite and job_file.exists():
        before = read_json(job_file)
        values.server_software = before.get("server_software")
        if values.server_input == "auto" and before.get("server_input") in get_args(ServerInput):
            values.server_input = before["server_input"]


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
        budget=values.budget,
    )
    speech = () if values.context else None  # refused before the first clip, not at the first one with a transcript
    captioner.read_spec(CaptionRequest(Path(), values.prompt, speech=speech), values.shape)
    values.server_input = captioner.input
    values.server_software = OWN_SOFTWARE if captioner.is_own else None  # it is asked in another way than others
    ledger.update_job(server_settings(values))
    if not values.quiet:
        sys.stderr.write(f"clips are sent to {captioner.name} as {captioner.input}\n")
    return captioner


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
