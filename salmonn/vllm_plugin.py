"""Entry point of vLLM's plugins, which vLLM calls in each of its processes. It imports no torch."""

import multiprocessing
import os
import threading


def register() -> None:
    """Register the language model of video-SALMONN 2 and 2+; vLLM imports it when a checkpoint names it."""
    from vllm import ModelRegistry  # noqa: PLC0415

    ModelRegistry.register_model("SalmonnForCausalLM", "salmonn.caption.vllm_model:SalmonnForCausalLM")
    # vLLM's engine outlives a process that is killed, and keeps its GPU memory.
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
