"""Options of `salmonn caption --engine vllm`: captions by vLLM of a video-SALMONN 2 or 2+."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from salmonn.caption.generator import SHIPPED_MODEL
from salmonn.cli.options import model_placement

if TYPE_CHECKING:
    from salmonn.caption.vllm_captioner import VLLMCaptioner

# Arguments of vLLM that follow from other options.
_OWN_ARGUMENTS = {
    "model": "--model", "dtype": "--dtype", "max_num_seqs": "--batch-size", "quantization": "the checkpoint",
    "enable_mm_embeds": "the model", "hf_overrides": "the model", "generation_config": "the model",
    "tokenizer": "the model", "disable_log_stats": "the run",
}  # fmt: skip


def add_vllm_options(group: Any) -> None:
    """Add the arguments of vLLM to an argument group."""
    arguments = "with --engine vllm, arguments of its engine as a JSON object, such as "
    arguments += '{"tensor_parallel_size": 4, "gpu_memory_utilization": 0.8, "max_model_len": 32768}'
    group.add_argument("--vllm_args", type=dict[str, Any] | None, default=None, help=arguments)


def check_vllm_options(values: Namespace) -> None:
    """Raise a ValueError for what vLLM cannot do, or if it is not installed."""
    if values.engine != "vllm":
        if values.vllm_args is not None:
            raise ValueError("--vllm-args needs --engine vllm")
        return
    if values.format == "events":
        raise ValueError("--format events needs the local engine, since vLLM does not constrain captions here")
    local = {"--bits": values.bits, "--device-map": values.device_map, "--ray-actors": values.ray_actors}
    if given := [flag for flag, value in local.items() if value is not None]:
        raise ValueError(f"{given[0]} has no effect with --engine vllm; remove it (see --vllm-args)")
    if wrong := sorted(_OWN_ARGUMENTS.keys() & set(values.vllm_args or {})):
        raise ValueError(f"--vllm-args has {wrong[0]}, which {_OWN_ARGUMENTS[wrong[0]]} sets; leave it out there")
    if find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm needs vLLM, which requires its own version of torch: run this command in a separate "
            "environment, with pip install 'salmonn[vllm]' in it"
        )


def load_vllm_captioner(values: Namespace) -> "VLLMCaptioner":
    """Load the towers and start vLLM as the flags describe; raises as `load_vllm`."""
    from salmonn import dist
    from salmonn.caption.vllm_captioner import load_vllm

    if dist.world_size() > 1:
        raise ValueError(
            "--engine vllm needs one process, which starts others for several GPUs; start it without torchrun"
        )
    return load_vllm(
        values.model or SHIPPED_MODEL,
        placement=model_placement(values),
        adapter=values.adapter,
        published_positions=values.published_positions,
        reader=values.reader,
        batch_size=values.batch_size,
        arguments=values.vllm_args,
    )
