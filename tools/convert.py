"""Convert published weights from pickles to safetensors, without running code that a pickle may contain.

    python tools/convert.py SOURCE --out FOLDER [--lora-alpha ALPHA]

SOURCE is a model folder (`pytorch_model.bin`, alone or as shards with their index; `adapter_model.bin`; any other
single .bin, .pt or .pth file), or such a file. The folder's small files (config, tokenizer, chat template) are copied.
LoRA matrices alone become an adapter folder; those saved with the weights of their model are merged into them. Where
there is no adapter_config.json, `--lora-alpha` gives their scale.

A pickle is a program: files are read with torch's `weights_only`, which allows tensors and refuses everything else.
They are memory-mapped, so that a model may be larger than memory; only tensors that must be rearranged are copied, one
shard at a time. FOLDER is written atomically.
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
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from salmonn.config import FlagParser
from salmonn.files import atomic_folder, write_json

USAGE_ERROR = 2
PICKLES = (".bin", ".pt", ".pth")
PICKLE_NAMES = {"model": "pytorch_model", "adapter_model": "adapter_model"}  # by the name of the converted file
# Pickles that training leaves next to the weights.
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
SHARD_NAME = re.compile(r"-\d+-of-\d+$")
WRAPPERS = ("model", "state_dict", "module")
LORA_A, LORA_B, BASE = ".lora_A.", ".lora_B.", ".base_layer."
PEFT_PREFIX = "base_model.model."
DISTRIBUTED_PREFIX = "module."  # of all names in a state dict of DistributedDataParallel
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
LICENSES = ("LICENSE", "NOTICE")
NEED_ALPHA = "pass --lora-alpha with the value that they were trained with (published models: 256 with rank 128)"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and convert; errors end with a message and exit code 2."""
    parser = FlagParser(description="Convert pickled weights to safetensors; pickles with code are refused.")
    parser.add_argument("source", type=Path, help="model or adapter folder, or a .bin, .pt or .pth file")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the converted model")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="maximum size of a weights file, in 10^9 bytes")
    parser.add_argument("--lora_alpha", type=int, help="scale of an adapter without an adapter_config.json")
    values = parser.parse_args(args)
    try:
        convert(values.source, out=values.out, shard_gb=values.shard_gb, lora_alpha=values.lora_alpha)
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USAGE_ERROR)


def convert(source: Path, *, out: Path, shard_gb: float = 5.0, lora_alpha: int | None = None) -> None:
    """Write the weights of a folder or file as safetensors, and copy the folder's small files.

    Raises:
        ValueError: the source has no weights, is incomplete or contains code; the scale of an adapter is unknown; or
            `out` is not empty.
    """
    if shard_gb <= 0:
        raise ValueError(f"--shard-gb must be above 0, got {shard_gb}")
    weights = find_weights(source)
    with atomic_folder(out) as folder:
        copied = copy_small_files(source, folder)
        for name, files in weights.items():
            tensors = read_shards(files)
            if any(BASE in key for key in tensors):
                tensors = merge_lora(tensors, lora_alpha=take_alpha(folder, lora_alpha))
            elif any(LORA_A in key for key in tensors):
                name = "adapter_model"  # noqa: PLW2901
                tensors = {
                    PEFT_PREFIX + key.removeprefix(PEFT_PREFIX).replace(".default.", "."): tensor
                    for key, tensor in tensors.items()
                }
                write_adapter_config(tensors, folder, lora_alpha=lora_alpha)
            elif lora_alpha is not None:
                raise ValueError("--lora-alpha is for LoRA matrices, but the source has none; remove it")
            for group in find_shared(tensors):
                _report(f"{' and '.join(group)} share memory in the source; each is written in full")
            # PEFT reads an adapter from a single file.
            max_bytes = sys.maxsize if name == "adapter_model" else max(1, int(shard_gb * 1e9))
            write_weights(tensors, folder, name=name, max_bytes=max_bytes)
        copied = {name for name in copied if (folder / name).exists()}
    used = {file.name for files in weights.values() for file in files}
    _report(f"converted {', '.join(sorted(used))} to {out}; copied: {', '.join(sorted(copied)) or 'nothing'}")
    if source.is_dir():
        skipped = {file.name for file in source.iterdir() if file.is_file()} - used - copied
        if skipped:
            _report(f"skipped: {', '.join(sorted(skipped))}")


def find_weights(source: Path) -> dict[str, list[Path]]:
    """Return the pickle files of a source by the name of the converted file: model, adapter_model.

    Raises:
        ValueError: there are none, or several candidates.
    """
    if source.is_file():
        if source.suffix not in PICKLES:
            raise ValueError(
                f"{source} is not a {', '.join(PICKLES)} file; use a file of pickled weights, or its folder"
            )
        if SHARD_NAME.search(source.stem):
            raise ValueError(f"{source} is one of several shards; use the folder {source.parent}")
        return {"adapter_model" if source.stem == "adapter_model" else "model": [source]}
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; use a model folder, or a file of pickled weights")
    found = {name: _find_shards(source, f"{pickled}.bin") for name, pickled in PICKLE_NAMES.items()}
    if any(found.values()):
        return {name: files for name, files in found.items() if files}
    others = sorted(
        file for file in source.iterdir() if file.suffix in PICKLES and not NOT_WEIGHTS.fullmatch(file.stem)
    )
    if len(others) == 1:
        return {"model": others}
    if others:
        names = ", ".join(file.name for file in others)
        raise ValueError(f"{source} has several weights files and no index of them ({names}); use one of them")
    if any(source.glob("*.safetensors")):
        raise ValueError(f"the weights in {source} are safetensors already; nothing to convert")
    raise ValueError(f"{source} has no weights: no file ends with {', '.join(PICKLES)}")


def _find_shards(folder: Path, name: str) -> list[Path]:
    """Return the file of this name, or the shards that its index lists."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of shards; download it again") from error
    if missing := [shard for shard in names if not (folder / shard).is_file()]:
        raise ValueError(f"{folder} is incomplete: {index.name} lists missing files ({', '.join(missing)})")
    return [folder / shard for shard in names]


def read_shards(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read the memory-mapped tensors of all shards, without the prefix of DistributedDataParallel."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = unwrap(read_pickle(file), file)
        if repeated := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{file} repeats {repeated[0]} of an earlier shard; the shards belong to different models")
        tensors |= shard
    if all(name.startswith(DISTRIBUTED_PREFIX) for name in tensors):
        return {name.removeprefix(DISTRIBUTED_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def read_pickle(file: Path) -> Any:
    """Read a file of torch.save with memory-mapped tensors.

    Raises:
        ValueError: the file contains code, or is damaged.
    """
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it calls {called[1]}" if called else "it contains more than tensors"
        raise ValueError(
            f"refusing {file}: it would run code ({reason}). Only files of tensors are supported; request the weights "
            "as safetensors, or as a plain state_dict"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"cannot read {file}: it is damaged, truncated, a git-lfs pointer, or in the format of torch before 1.6. "
            "Download it again, or save it with a newer torch"
        ) from error


def unwrap(values: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict in a pickle, which may be nested as {"model": ...} or similar.

    Raises:
        ValueError: there is none or several, or it contains something other than plain tensors.
    """
    for _ in WRAPPERS:  # a limit, since a pickle may contain itself
        nested = [key for key in WRAPPERS if isinstance(values, dict) and isinstance(values.get(key), dict)]
        if not nested:
            break
        if len(nested) > 1:
            raise ValueError(f"{file} has several state dicts ({' and '.join(nested)}); save only the right one")
        if skipped := sorted(map(str, values.keys() - nested)):
            _report(f"{file.name}: using only {nested[0]}; skipped: {', '.join(skipped)}")
        values = values[nested[0]]
    if not isinstance(values, dict) or not values:
        raise ValueError(f"refusing {file}: expected named tensors, found {type(values).__name__} {values!r:.60}")
    for name, value in values.items():
        is_plain = (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
        )
        if not isinstance(name, str) or not is_plain:
            raise ValueError(f"refusing {file}: it contains more than plain tensors: {name} is {value!r:.60}")
    return {name: value.detach() for name, value in values.items()}


def take_alpha(folder: Path, lora_alpha: int | None) -> int:
    """Return the scale of LoRA matrices that are saved with their model: `lora_alpha`, or that of the copied config.

    adapter_config.json is removed from the folder, since the merged model is not an adapter.

    Raises:
        ValueError: the scale is unknown, given twice or differs between matrices.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        if lora_alpha is None:
            raise ValueError(
                "the source has LoRA matrices with their model and no adapter_config.json with their scale; "
                + NEED_ALPHA
            )
        return lora_alpha
    _refuse_second_alpha(lora_alpha)
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("use_rslora") or config.get("use_dora") or config.get("alpha_pattern"):
        raise ValueError("adapter_config.json describes more than plain LoRA with one scale; merge it with PEFT")
    file.unlink()
    return int(config["lora_alpha"])


def _refuse_second_alpha(lora_alpha: int | None) -> None:
    if lora_alpha is not None:
        raise ValueError("--lora-alpha is for sources without adapter_config.json, but the source has one; remove it")


def merge_lora(tensors: dict[str, Tensor], *, lora_alpha: int) -> dict[str, Tensor]:
    """Merge the LoRA matrices in a model's state dict (base + alpha / rank * B A) and restore the model's own names."""
    by_name = {key.replace(".default.", "."): tensor for key, tensor in tensors.items()}
    merged = {}
    for key, tensor in by_name.items():
        if LORA_A in key or LORA_B in key or ".original_module." in key:
            continue
        value = tensor
        layer = key.split(BASE)[0]
        if key.endswith(f"{BASE}weight") and (a := by_name.get(f"{layer}{LORA_A}weight")) is not None:
            product = by_name[f"{layer}{LORA_B}weight"].float() @ a.float()
            value = (tensor.float() + lora_alpha / len(a) * product).to(tensor.dtype)
        merged[key.removeprefix(PEFT_PREFIX).replace(BASE, ".").replace(".modules_to_save.", ".")] = value
    return merged


def write_adapter_config(tensors: dict[str, Tensor], folder: Path, *, lora_alpha: int | None) -> None:
    """Write the adapter_config.json that PEFT needs, unless it was copied.

    Raises:
        ValueError: the scale is unknown or given twice, or the matrices have several ranks.
    """
    if (folder / "adapter_config.json").is_file():
        _refuse_second_alpha(lora_alpha)
        return
    ranks = {len(tensor) for key, tensor in tensors.items() if LORA_A in key}
    if len(ranks) > 1:
        raise ValueError(f"the adapter's matrices have several ranks, {sorted(ranks)}; add its adapter_config.json")
    if lora_alpha is None:
        raise ValueError(
            f"the source has LoRA matrices of rank {ranks.pop()} without an adapter_config.json with their scale; "
            + NEED_ALPHA
        )
    targets = sorted({key.split(LORA_A)[0].rsplit(".", 1)[-1] for key in tensors if LORA_A in key})
    config = LoraConfig(r=ranks.pop(), lora_alpha=lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    config.save_pretrained(str(folder))


def find_shared(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Return groups of names whose tensors share memory: tied weights, and views of one tensor."""
    by_memory = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            by_memory[tensor.untyped_storage().data_ptr()].append(name)
    return [names for names in by_memory.values() if len(names) > 1]


def write_weights(tensors: dict[str, Tensor], folder: Path, *, name: str, max_bytes: int) -> None:
    """Write tensors to one file, or to shards of at most `max_bytes` and their index.

    Each tensor is written contiguously and in its own memory, as safetensors requires.
    """
    # Planned with tensors without memory: those that share memory would have to go into the same shard.
    sizes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=max_bytes
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {key: tensors[key] for key in names}
        to_copy = {key for group in find_shared(shard) for key in group[1:]}
        for key, tensor in shard.items():
            shard[key] = tensor.clone(memory_format=torch.contiguous_format) if key in to_copy else tensor.contiguous()
        save_file(shard, str(folder / file), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{name}.safetensors.index.json", index)


def copy_small_files(source: Path, folder: Path) -> set[str]:
    """Copy config, tokenizer, licenses and similar files, except indices of pickled shards; return their names.

    The files next to a single source file are copied only if they belong to a model.
    """
    parent = source if source.is_dir() else source.parent
    configs = [parent / "config.json", parent / "adapter_config.json"]
    if source.is_file() and not any(config.is_file() for config in configs):
        return set()
    small = [
        file
        for file in parent.iterdir()
        if (file.suffix in COPIED_SUFFIXES or file.name in LICENSES)
        and not file.name.endswith(".index.json")
        and file.is_file()
    ]
    for file in small:
        shutil.copyfile(file, folder / file.name)
    return {file.name for file in small}


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
