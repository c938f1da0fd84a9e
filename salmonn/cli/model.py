"""The flags that say which model and where, shared by the commands that load one."""

from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner


def add_model(parser: FlagParser) -> None:
    """Add --model and all that tells how it is loaded."""
    dtypes = Literal["auto", "float32", "bfloat16", "float16"]
    attentions = Literal["auto", "eager", "sdpa", "flash_attention_2"]
    parser.add_argument("--model", type=str | None, default=None, help="folder or hub id (default: the toy model)")
    parser.add_argument("--adapter", type=str | None, default=None, help="PEFT folder or hub id, put on the model")
    parser.add_argument("--published-positions", action="store_true", help="2+: number as the published inference code")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ... (default: cuda where present)")
    parser.add_argument("--device-map", type=str | None, default=None, help="auto: split the model over all GPUs")
    parser.add_argument("--dtype", type=dtypes, default="auto", help="of weights (auto: bfloat16 on a GPU)")
    parser.add_argument(
        "--attention", type=attentions, default="auto", help="of the towers (auto: flash attention where installed)"
    )
    parser.add_argument("--bits", type=Literal[4, 8] | None, default=None, help="quantise the language model")


def load_captioner(values: Namespace) -> "Captioner":
    """The model that the flags describe. Raises as `Captioner.load`."""
    from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
    from salmonn.model.loading import Placement

    return Captioner.load(
        values.model or SHIPPED_MODEL,
        placement=Placement(values.device, values.device_map, values.dtype, values.attention, values.bits),
        adapter=values.adapter,
        published_positions=values.published_positions,
    )
