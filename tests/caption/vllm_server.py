"""A real vLLM on this machine, with a small Qwen2.5-Omni of random weights."""

import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.limits import RUN_SECONDS, wait_until
from tests.omni_models import OMNI_TOKENS, make_qwen2_5_omni

MODEL_NAME = "omni"
MAX_LORA_RANK = 64
_PREPROCESSOR = {
    "processor_class": "Qwen2_5OmniProcessor", "feature_extractor_type": "WhisperFeatureExtractor",
    "image_processor_type": "Qwen2VLImageProcessor", "return_attention_mask": True, "sampling_rate": 16_000,
    "chunk_length": 300, "n_samples": 4_800_000, "nb_max_frames": 30_000, "feature_size": 128, "hop_length": 160,
    "n_fft": 400, "padding_side": "right", "padding_value": 0.0, "min_pixels": 3136, "max_pixels": 12544,
    "merge_size": 2, "patch_size": 14, "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type in ("image", "image_url") %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif part.type in ("audio", "audio_url", "input_audio") %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif part.type in ("video", "video_url") %}<|vision_bos|><|VIDEO|><|vision_eos|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class VLLMServer:
    """A running server.

    Args:
        url: address for OpenAI clients.
        model: folder of the model.
        log_path: file of the server's output.
    """

    def __init__(self, url: str, model: Path, log_path: Path) -> None:
        self.url, self.model, self.log_path = url, model, log_path

    def post(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Send a request, and return the status and the body of the answer."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{route}", data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text


def make_served_omni(folder: Path) -> None:
    """Make a Qwen2.5-Omni with what vLLM needs on a CPU: files of its processor, and heads that are not 16 wide."""
    make_qwen2_5_omni(folder, texts=["a red circle moves to the left, a high tone is heard"], head_dim=32)
    config = json.loads((folder / "config.json").read_text())
    del config["talker_config"]
    config |= {"architectures": ["Qwen2_5OmniModel"], "enable_audio_output": False}
    thinker = config["thinker_config"]
    thinker["tie_word_embeddings"] = thinker["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {**OMNI_TOKENS, "extra_special_tokens": OMNI_TOKENS, "chat_template": _CHAT_TEMPLATE}
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Qwen2_5OmniProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@contextmanager
def serve_with_vllm(executable: str, model: Path, *, log_path: Path) -> Iterator[VLLMServer]:
    """Start vLLM on a free port, in float32, and stop it at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    limits = json.dumps({"image": 64, "video": 1, "audio": 1})
    command = [executable, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", str(MAX_LORA_RANK), "--max-num-seqs", "8"]
    command += ["--limit-mm-per-prompt", limits, "--trust-request-mm-kwargs", "--generation-config", "vllm"]
    # A random model would fill its reply with the white space that JSON may have.
    command += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it has its own packages
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=inherited | {"VLLM_NO_USAGE_STATS": "1"} | env)
    try:
        wait_until(lambda: process.poll() is not None or _has_started(log_path), seconds=RUN_SECONDS)
        assert process.poll() is None, log_path.read_text()
        yield VLLMServer(f"http://127.0.0.1:{port}/v1", model, log_path)
    finally:
        process.terminate()
        process.wait()


def _has_started(log_path: Path) -> bool:
    return re.search(r"Application startup complete", log_path.read_text()) is not None
