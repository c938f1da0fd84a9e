"""Entry point of vLLM's plugins, which vLLM calls in each of its processes. It imports no torch."""


def register() -> None:
    """Register the language model of video-SALMONN 2 and 2+; vLLM imports it when a checkpoint names it."""
    from vllm import ModelRegistry  # noqa: PLC0415

    ModelRegistry.register_model("SalmonnForCausalLM", "salmonn.caption.vllm_model:SalmonnForCausalLM")
