"""Turn published weights that come as pickles into safetensors, without running what a pickle can hold.

    python tools/convert.py SOURCE --out FOLDER [--lora_alpha ALPHA]

SOURCE is a model's folder (`pytorch_model.bin`, whole or in shards with their index; `adapter_model.bin`; any other
single .bin, .pt or .pth file), or such a file. The folder's small files (config, tokenizer, chat template) are copied.
LoRA matrices become an adapter's folder, and those that lie beside the weights of their model are merged into them;
where no adapter_config.json tells by what they are scaled, `--lora_alpha` does.

A pickle is a program: files are read by torch's `weights_only`, which knows tensors and refuses all else. They are
mapped, not read, so that a model larger than memory can be converted; only what must be rearranged is copied, one
shard at a time. FOLDER appears whole or not at all.
"""

import json
import pickle
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from jsonargparse import ArgumentParser
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from salmonn.records import atomic_folder, write_json

WRONG_USAGE = 2
PICKLES = (".bin", ".pt", ".pth")
PUBLISHED_NAMES = {"model": "pytorch_model", "adapter_model": "adapter_model"}  # ours -> those of the pickles
# What training leaves beside the weights, pickled too.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
ONE_OF_SEVERAL = re.compile(r"-\d+-of-\d+$")
WRAPPERS = ("model", "state_dict", "module")
LORA_A, LORA_B, BASE = ".lora_A.", ".lora_B.", ".base_layer."
PEFT_PREFIX = "base_model.model."
DISTRIBUTED = "module."  # how DistributedDataParallel begins every name
COPIED = (".json", ".jinja", ".txt", ".model", ".md")
LICENCES = ("LICENSE", "NOTICE")


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and convert; what is wrong is said in a sentence, with exit code 2."""
    parser = ArgumentParser(
        description="Turn pickled weights into safetensors; pickles that would run code are refused."
    )
    parser.add_argument("source", type=Path, help="a model's or an adapter's folder, or one .bin, .pt or .pth file")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the converted model")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="greatest size of a file of weights, in 10^9 bytes")
    parser.add_argument("--lora_alpha", type=int, help="of an adapter that has no adapter_config.json")
    values = parser.parse_args(args)
    try:
        convert(values.source, out=values.out, shard_gb=values.shard_gb, lora_alpha=values.lora_alpha)
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(WRONG_USAGE)


def convert(source: Path, *, out: Path, shard_gb: float = 5.0, lora_alpha: int | None = None) -> None:
    """Write the weights of a folder or a file as safetensors, and the folder's small files beside them.

    Raises:
        ValueError: the source is no weights, or not whole, or would run code; or it is an adapter of unknown scale; or
            `out` holds something already.
    """
    if shard_gb <= 0:
        raise ValueError(f"--shard_gb must be above 0, got {shard_gb}")
    weights = find_weights(source)
    with atomic_folder(out) as folder:
        copied = copy_small_files(source, folder)
        for name, files in weights.items():
            tensors = without_prefix(read_all(files))
            if any(BASE in key for key in tensors):
                tensors = merged(tensors, lora_alpha=alpha_of_merged(folder, lora_alpha))
            elif any(LORA_A in key for key in tensors):
                name, tensors = "adapter_model", by_names_of_peft(tensors)  # noqa: PLW2901
                write_adapter_config(tensors, folder, lora_alpha=lora_alpha)
            elif lora_alpha is not None:  # of plain weights
                raise ValueError("--lora_alpha is for LoRA matrices, and the source holds none: leave it out")
            for shared in sharing(tensors):
                _tell(f"{' and '.join(shared)} share memory in the source: each is written whole")
            # PEFT reads an adapter from one file only.
            limit = sys.maxsize if name == "adapter_model" else max(1, int(shard_gb * 1e9))
            write_weights(tensors, folder, name=name, limit=limit)
        copied = {name for name in copied if (folder / name).exists()}
    used = {file.name for files in weights.values() for file in files}
    _tell(f"{out} holds the weights of {', '.join(sorted(used))}; copied: {', '.join(sorted(copied)) or 'nothing'}")
    if source.is_dir() and (left := sorted({file.name for file in source.iterdir() if file.is_file()} - used - copied)):
        _tell(f"left out: {', '.join(left)}")


def find_weights(source: Path) -> dict[str, list[Path]]:
    """The files of weights by what they become: model, adapter_model.

    Raises:
        ValueError: there are none, or it is not clear which.
    """
    if source.is_file():
        if source.suffix not in PICKLES:
            raise ValueError(f"{source} is none of {', '.join(PICKLES)}: give a file of pickled weights, or its folder")
        if ONE_OF_SEVERAL.search(source.stem):
            raise ValueError(f"{source} is one shard of several: give the folder, {source.parent}")
        return {"adapter_model" if source.stem == "adapter_model" else "model": [source]}
    if not source.is_dir():
        raise ValueError(f"there is no {source}: give the folder of a model, or a file of pickled weights")
    found = {name: _named(source, f"{pickled}.bin") for name, pickled in PUBLISHED_NAMES.items()}
    if any(found.values()):
        return {name: files for name, files in found.items() if files}
    others = sorted(file for file in source.iterdir() if file.suffix in PICKLES and not NO_WEIGHTS.fullmatch(file.stem))
    if len(others) == 1:
        return {"model": others}
    if others:
        names = ", ".join(file.name for file in others)
        raise ValueError(f"{source} holds several files of weights and no index of them ({names}): give one of them")
    if any(source.glob("*.safetensors")):
        raise ValueError(f"the weights in {source} are safetensors already: there is nothing to convert")
    raise ValueError(f"{source} holds no weights: there is no {', '.join(f'*{suffix}' for suffix in PICKLES)} file")


def _named(folder: Path, name: str) -> list[Path]:
    """The file of that name, or its shards as their index lists them."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: fetch it again") from error
    if missing := [shard for shard in listed if not (folder / shard).is_file()]:
        raise ValueError(f"{folder} is incomplete: {index.name} lists {', '.join(missing)}, which are not there")
    return [folder / shard for shard in listed]


def read_all(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of all shards, mapped."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = unwrap(read_pickle(file), file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{file} holds {twice[0]}, which a shard before it holds too: these are of two models")
        tensors |= shard
    return tensors


def read_pickle(file: Path) -> Any:
    """What a file of torch.save holds, tensors mapped.

    Raises:
        ValueError: it would run code, or is damaged.
    """
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"it calls for {named[1]}" if named else "it holds something other than tensors"
        raise ValueError(
            f"{file} is refused: it would run code ({wants}). Only files of nothing but tensors are read: ask for the "
            "weights as safetensors, or as a plain state_dict"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged or cut short, or a git-lfs pointer in place of the file, or in "
            "torch's format from before 1.6. Fetch it again, or save it anew with today's torch"
        ) from error


def unwrap(values: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, taken out of {"model": ...} and its like.

    Raises:
        ValueError: there is no single one, or it holds something that is no plain tensor.
    """
    for _ in WRAPPERS:  # no more, since a pickle may hold itself
        inner = [key for key in WRAPPERS if isinstance(values, dict) and isinstance(values.get(key), dict)]
        if not inner:
            break
        if len(inner) > 1:
            raise ValueError(f"{file} holds several state dicts, {' and '.join(inner)}: save the right one alone")
        if left := sorted(map(str, values.keys() - inner)):
            _tell(f"of {file.name} only {inner[0]} is taken; left out: {', '.join(left)}")
        values = values[inner[0]]
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{file} is refused: it holds no tensors by name but {type(values).__name__} {values!r:.60}")
    for name, value in values.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(f"{file} is refused: it holds something other than plain tensors: {name} is {value!r:.60}")
    return {name: value.detach() for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the model's own names, where DistributedDataParallel has put `module.` before each."""
    if not all(name.startswith(DISTRIBUTED) for name in tensors):
        return tensors
    return {name.removeprefix(DISTRIBUTED): tensor for name, tensor in tensors.items()}


def by_names_of_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as PEFT saves an adapter: below its own prefix, without the adapter's name."""
    return {
        PEFT_PREFIX + key.removeprefix(PEFT_PREFIX).replace(".default.", "."): tensor for key, tensor in tensors.items()
    }


def alpha_of_merged(folder: Path, lora_alpha: int | None) -> int:
    """What scales LoRA matrices beside a model's weights: `lora_alpha`, or that of the copied adapter_config.json.

    That file is taken away again: a merged model is no adapter.

    Raises:
        ValueError: nothing tells the scale, or two things do, or it is not one for all.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        if lora_alpha is None:
            raise ValueError(
                "the source holds a model with LoRA matrices beside its weights, and no adapter_config.json tells "
                "their scale: say with --lora_alpha what they were trained with (the published models: 256 at rank 128)"
            )
        return lora_alpha
    _refuse_second_alpha(lora_alpha)
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("use_rslora") or config.get("use_dora") or config.get("alpha_pattern"):
        raise ValueError("adapter_config.json tells of other than plain LoRA of one scale: merge it with PEFT")
    file.unlink()
    return int(config["lora_alpha"])


def _refuse_second_alpha(lora_alpha: int | None) -> None:
    if lora_alpha is not None:
        raise ValueError("--lora_alpha is for sources without adapter_config.json, and there is one: leave it out")


def merged(tensors: dict[str, Tensor], *, lora_alpha: int) -> dict[str, Tensor]:
    """A model that was saved with its adapter, as the model alone: base + alpha / r * B A, by the model's own names."""
    by_name = {key.replace(".default.", "."): tensor for key, tensor in tensors.items()}
    whole = {}
    for key, tensor in by_name.items():
        if LORA_A in key or LORA_B in key or ".original_module." in key:
            continue
        value = tensor
        layer = key.split(BASE)[0]
        if key.endswith(f"{BASE}weight") and (a := by_name.get(f"{layer}{LORA_A}weight")) is not None:
            product = by_name[f"{layer}{LORA_B}weight"].float() @ a.float()
            value = (tensor.float() + lora_alpha / len(a) * product).to(tensor.dtype)
        name = key.removeprefix(PEFT_PREFIX).replace(BASE, ".").replace(".modules_to_save.", ".")
        whole[name] = value
    return whole


def write_adapter_config(tensors: dict[str, Tensor], folder: Path, *, lora_alpha: int | None) -> None:
    """Write the adapter_config.json that PEFT needs, unless it was copied.

    Raises:
        ValueError: nothing tells the scale; or the matrices are not all of one rank.
    """
    if (folder / "adapter_config.json").is_file():
        _refuse_second_alpha(lora_alpha)
        return
    ranks = {len(tensor) for key, tensor in tensors.items() if LORA_A in key}
    if len(ranks) > 1:
        raise ValueError(f"the adapter's matrices have several ranks, {sorted(ranks)}: give its adapter_config.json")
    if lora_alpha is None:
        raise ValueError(
            f"these are LoRA matrices of rank {ranks.pop()} without an adapter_config.json, and nothing in them tells "
            "their scale: say with --lora_alpha what they were trained with (the published models: 256 at rank 128)"
        )
    targets = sorted({key.split(LORA_A)[0].rsplit(".", 1)[-1] for key in tensors if LORA_A in key})
    LoraConfig(r=ranks.pop(), lora_alpha=lora_alpha, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )


def sharing(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names of tensors that lie in the same memory: tied weights, and parts of one tensor."""
    by_memory = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            by_memory[tensor.untyped_storage().data_ptr()].append(name)
    return [names for names in by_memory.values() if len(names) > 1]


def write_weights(tensors: dict[str, Tensor], folder: Path, *, name: str, limit: int) -> None:
    """Write tensors to one file, or to shards of at most `limit` bytes and their index."""
    # Planned on tensors without memory: as they are, those that share some would have to go into one shard.
    sizes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=limit
    )
    for file, names in plan.filename_to_tensors.items():
        shard = apart({key: tensors[key] for key in names})
        save_file(shard, str(folder / file), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{name}.safetensors.index.json", index)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each whole and in memory of its own, as safetensors demands."""
    copied = {key for shared in sharing(tensors) for key in shared[1:]}
    return {
        key: tensor.clone(memory_format=torch.contiguous_format) if key in copied else tensor.contiguous()
        for key, tensor in tensors.items()
    }


def copy_small_files(source: Path, folder: Path) -> set[str]:
    """Copy config, tokenizer and their like; indices of pickled shards stay behind.

    Beside a single file there may be anything: there they are copied only if they belong to a model.
    """
    beside = source if source.is_dir() else source.parent
    configs = [beside / "config.json", beside / "adapter_config.json"]
    if source.is_file() and not any(config.is_file() for config in configs):
        return set()
    small = [
        file
        for file in beside.iterdir()
        if (file.suffix in COPIED or file.name in LICENCES) and not file.name.endswith(".index.json") and file.is_file()
    ]
    for file in small:
        shutil.copyfile(file, folder / file.name)
    return {file.name for file in small}


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
