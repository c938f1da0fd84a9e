"""Recognize a changed model by the config, names, sizes and times of its files; imports no torch."""

from hashlib import blake2b
from pathlib import Path


def fingerprint_folder(folder: Path) -> str:
    """Hash the configs of a model or an adapter, and the names, sizes and times of its weights."""
    state = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "adapter_config.json"):
            state.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt"):
            found = path.stat()
            state.update(repr((path.name, found.st_size, found.st_mtime_ns)).encode())
    return state.hexdigest()
