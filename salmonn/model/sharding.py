"""Networks that are sharded over the processes from the start, for models that do not fit on one GPU (FSDP2).

    build on the meta device -> attach an adapter -> shard -> each process reads its rows of each weight from the files

Row n of a weight belongs to the process that `torch.chunk` gives it to. Adapters are merged from file to file, so that
no process holds the merged model either.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from salmonn import dist
from salmonn.files import write_json
from salmonn.model.loading import Placement, load_config, published_names
from salmonn.model.lora import ADAPTER, AdapterSum, LoraConfig, MergeRounding, attach_lora
from salmonn.model.network import Network
from salmonn.model.weight_files import INDEX_NAME, WEIGHTS_NAME, WeightFiles
from salmonn.system import flush

FILE_BYTES = 4 << 30  # of a file of a merged model


def shard_network(network: nn.Module) -> None:
    """Shard a network in place: one group per decoder layer and one for everything else.

    The encoders belong to the latter: a batch may lack video or audio, and all processes must gather the same groups.
    """
    if isinstance(network, FSDPModule):
        return
    for name, layers in network.named_modules():
        if name.startswith("lm.") and name.endswith(".layers"):
            for layer in layers.children():
                fully_shard(layer)
    fully_shard(network)


def load_sharded(path: Path | str, *, placement: Placement, lora: LoraConfig, seed: int) -> Network:
    """Load a network with a fresh adapter; each process reads and holds only its shards.

    Weights, adapter included, are those of `load_network` and `attach_lora`. Its towers cannot be called separately, so
    clips must have been encoded before.

    Args:
        path: model folder, or hub id.
        placement: type of the weights.
        lora: adapter.
        seed: seed of the adapter.

    Raises:
        ValueError: the weights are missing or do not fit the config.
    """
    network = build_empty(path, placement)
    attach_lora(network, lora, seed=seed)
    files = open_weights(path, network)
    shard_network(network)
    device = dist.device()
    # Only parameters are empty: buffers that are not in the files were computed when the network was built.
    network._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" not in name:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(files.read(base_name(name), own_rows(parameter)))
        for parameter, value in zip(adapter_parameters(network), draw_adapter(network, seed=seed), strict=True):
            copy_rows(parameter, value.to(network.dtype))  # PEFT rounds them to the type of the weights, too
    return network.eval()


def load_encoders(path: Path | str, *, placement: Placement) -> Network:
    """Load a network's encoders and embeddings, which encode clips; its decoder has no weights.

    Args:
        path: model folder, or hub id.
        placement: type of the weights.

    Raises:
        ValueError: the weights are missing or do not fit the config.
    """
    network = build_empty(path, placement)
    files, device = open_weights(path, network), dist.device()
    for module in filter(None, (network.vision, network.audio, network.lm.get_input_embeddings())):
        module._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(files.read(name))
    return network.eval()


def build_empty(path: Path | str, placement: Placement) -> Network:
    """Build a network whose parameters have no memory, with its buffers."""
    from accelerate import init_empty_weights  # noqa: PLC0415 - takes a second

    arguments = placement.to_transformers()
    with init_empty_weights(include_buffers=False):
        network: Network = Network._from_config(
            load_config(path), dtype=arguments["dtype"], attn_implementation=arguments["attn_implementation"]
        )
    network.tie_weights()  # each was replaced by a separate parameter
    return network


def open_weights(path: Path | str, network: Network) -> WeightFiles:
    """Open the files of a network's weights.

    Raises:
        ValueError: they are missing or do not fit the network.
    """
    ignored = tuple(network._keys_to_ignore_on_load_unexpected or ())
    files = WeightFiles(path, names=published_names(path), ignored=ignored)
    # A tied weight is one parameter with two names in the state dict, and may have both in the files.
    expected = {base_name(name): value for name, value in network.named_parameters() if ".lora_" not in name}
    files.require(expected, allowed=[base_name(name) for name in network.state_dict()])
    return files


def base_name(name: str) -> str:
    """Return the name of a parameter in a network without an adapter."""
    return name.replace("lm.base_model.model.", "lm.").replace(".base_layer.", ".")


def own_rows(parameter: Tensor) -> slice:
    """Return the rows of a parameter that this process holds: all, if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    size = -(-parameter.shape[0] // dist.world_size())
    start = min(dist.rank() * size, parameter.shape[0])
    return slice(start, min(start + size, parameter.shape[0]))


@torch.no_grad()
def copy_rows(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; this process may hold only some of its rows."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(value[own_rows(parameter)])


def adapter_parameters(network: Network) -> Iterator[nn.Parameter]:
    """Yield the matrices A and B of each adapted module."""
    for module in network.lm.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield from (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)


def draw_adapter(network: Network, *, seed: int) -> Iterator[Tensor]:
    """Yield the initial values of `adapter_parameters`, from the same random numbers as in `attach_lora`.

    PEFT makes two linear layers for each adapted module, which initialize themselves, then draws A again.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shapes = [parameter.shape for parameter in adapter_parameters(network)]
        for shape_a, shape_b in zip(shapes[::2], shapes[1::2], strict=True):
            a, b = (nn.Linear(shape[1], shape[0], bias=False).weight.detach() for shape in (shape_a, shape_b))
            yield nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            yield torch.zeros_like(b)


def merge_files(path: Path | str, adapters: Sequence[Path], folder: Path, *, placement: Placement) -> MergeRounding:
    """Write a model with adapters added, as `merge_in_float32` adds them: its config and safetensors of a few GiB each.

    The processes share the files; each holds one at a time. All of them must call this, and see the folder.

    Args:
        path: folder or hub id of the model that the first adapter was trained on.
        adapters: PEFT folders, in the order of training.
        folder: existing folder for the files.
        placement: type of the weights.

    Returns:
        Rounding of the last adapter's update.
    """
    network = build_empty(path, placement)
    files, total = open_weights(path, network), AdapterSum(adapters)
    parts = _split_by_size({name: value.nbytes for name, value in network.named_parameters()})
    names = [f"model-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]
    names = names if len(parts) > 1 else [WEIGHTS_NAME]
    for name, part in dist.shard(list(zip(names, parts, strict=True))):
        tensors = {}
        for key in part:
            weight = files.read(key).to(dist.device(), network.dtype)
            of_lm = key.removeprefix("lm.")
            tensors[key] = (total.add_to(of_lm, weight) if of_lm in total.names else weight).cpu().contiguous()
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        flush(folder / name)
    if dist.is_main():
        if len(parts) > 1:
            sizes = {"total_size": sum(value.nbytes for value in network.parameters())}
            places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            write_json(folder / INDEX_NAME, {"metadata": sizes, "weight_map": places})
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(str(folder))
    total.squares = [math.fsum(values) for values in zip(*dist.gather([total.squares]), strict=True)]
    return total.rounding()


def _split_by_size(sizes: Mapping[str, int]) -> list[list[str]]:
    """Split names, in order, into parts of at most `FILE_BYTES`, or of one tensor."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if parts[-1] and used + size > FILE_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts
