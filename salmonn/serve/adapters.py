"""LoRA adapters that are loaded while the server runs, by the routes of vLLM.

POST /v1/load_lora_adapter {"lora_name": "round_1", "lora_path": "/runs/adapters/round_1"}
POST /v1/unload_lora_adapter {"lora_name": "round_1"}

A request whose model is the name of an adapter is answered with it. The routes exist only if the server was started
with folders that adapters may be loaded from.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from salmonn.model.adapters import Adapter, read_adapter
from salmonn.model.network import Network
from salmonn.serve.errors import RequestError

MAX_ADAPTERS = 8  # held in memory


class LoadRequest(BaseModel):
    """Body of POST /v1/load_lora_adapter; further parameters of vLLM have no effect."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadRequest(BaseModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


class AdapterStore:
    """The adapters that are loaded.

    Args:
        network: network that they belong to.
        folders: folders that adapters may be loaded from; none disables loading.
        base_name: name of the model without an adapter.
    """

    def __init__(self, network: Network, folders: tuple[Path, ...], *, base_name: str) -> None:
        self.is_enabled = bool(folders)
        self._network, self._folders, self._base_name = network, tuple(one.resolve() for one in folders), base_name
        self._adapters: dict[str, tuple[Adapter, int]] = {}  # with the time of loading

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order of loading."""
        return list(self._adapters)

    def find(self, name: str) -> Adapter | None:
        """Return an adapter; None if there is none of that name."""
        found = self._adapters.get(name)
        return found and found[0]

    def describe(self, name: str) -> dict[str, Any]:
        """Return an adapter as an entry of the list of models."""
        created = self._adapters[name][1]
        entry = {"id": name, "object": "model", "created": created, "owned_by": "salmonn"}
        return entry | {"parent": self._base_name}

    def load(self, request: LoadRequest) -> None:
        """Read an adapter.

        Raises:
            RequestError: its name is in use, or its folder is not allowed, does not exist, or has no fitting adapter.
        """
        name = request.lora_name
        if name in (*self._adapters, self._base_name, "salmonn"):
            raise RequestError(f"the LoRA adapter {name!r} has already been loaded", param="lora_name")
        if len(self._adapters) >= MAX_ADAPTERS:
            raise RequestError(
                f"{MAX_ADAPTERS} adapters are loaded, which is the maximum; unload one with "
                "POST /v1/unload_lora_adapter",
                param="lora_name",
            )
        folder = Path(request.lora_path).resolve()
        if not any(folder.is_relative_to(one) for one in self._folders):
            raise RequestError(
                "lora_path must be below a folder of --lora-dirs, with which the server was started",
                param="lora_path",
                status=403,
            )
        if not (folder / "adapter_config.json").is_file():
            raise RequestError(f"No adapter found for {request.lora_path}", param="lora_path", status=404)
        try:
            adapter = read_adapter(folder, self._network)
        except ValueError as error:
            raise RequestError(str(error), param="lora_path") from error
        self._adapters[name] = adapter, int(time.time())

    def unload(self, name: str) -> None:
        """Forget an adapter; requests in progress keep it. Raises a RequestError if there is none of that name."""
        if self._adapters.pop(name, None) is None:
            raise RequestError(f"the LoRA adapter {name[:200]!r} cannot be found", param="lora_name", status=404)


def adapter_routes(store: AdapterStore) -> APIRouter:
    """Return the routes that load and unload adapters."""
    router = APIRouter()
    lock = asyncio.Lock()

    async def change(work: Callable[[], None], message: str) -> PlainTextResponse:
        async with lock:
            await asyncio.to_thread(work)
        return PlainTextResponse(message)

    @router.post("/v1/load_lora_adapter", summary="Load a LoRA adapter from a folder of the server")
    async def load(request: LoadRequest) -> PlainTextResponse:
        name = request.lora_name
        return await change(lambda: store.load(request), f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", summary="Unload a LoRA adapter")
    async def unload(request: UnloadRequest) -> PlainTextResponse:
        name = request.lora_name
        return await change(lambda: store.unload(name), f"Success: LoRA adapter '{name}' removed successfully.")

    return router
