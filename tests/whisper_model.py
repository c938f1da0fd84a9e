"""A tiny Whisper whose weights make it write a given text, at given times, for every window that it hears.

openai-whisper loads and decodes it like any other checkpoint: with language detection, timestamps and times of words.
"""

import math
import re
from pathlib import Path

import torch
from torch.nn.functional import layer_norm

STATE, CONTEXT, FRAMES_PER_SECOND = 64, 64, 50


def write_whisper(path: Path, text: str, *, language: str | None = "en") -> None:
    """Write a checkpoint.

    The layers add nothing to their input, a token's embedding plus a position's. The latter is a large multiple of the
    embedding of the token that is to follow, plus some noise. The query of the last cross-attention maps it to the
    encoder's sinusoid of the time at which the token is spoken; the encoder ignores the audio.

    Args:
        path: file to write.
        text: text with timestamps, such as "<|0.00|> Hello.<|1.50|>"; the words are spread evenly over its time.
        language: language that the model detects; None writes an English-only model.
    """
    from whisper.model import ModelDimensions, Whisper
    from whisper.tokenizer import get_tokenizer

    torch.manual_seed(0)
    num_vocab = 51864 if language is None else 51865
    model = Whisper(ModelDimensions(80, 1500, STATE, 1, 0, num_vocab, CONTEXT, STATE, 1, 2))
    tokenizer = get_tokenizer(language is not None, num_languages=99, language=language or "en", task="transcribe")
    start = list(tokenizer.sot_sequence)
    script = [*start[1:], *tokenizer.encoding.encode(text, allowed_special="all")]
    script = [*script, *[tokenizer.eot] * CONTEXT][:CONTEXT]
    times = _token_times(tokenizer, text)
    with torch.no_grad():
        embeddings = torch.randn(num_vocab, STATE)
        embeddings = embeddings / embeddings.norm(dim=1, keepdim=True) * math.sqrt(STATE)
        positions = 20 * embeddings[script] + 2 * torch.randn(CONTEXT, STATE)
        for parameter in [*model.encoder.conv1.parameters(), *model.encoder.conv2.parameters()]:
            parameter.zero_()
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("out.weight", "out.bias", "mlp.2.weight", "mlp.2.bias")):
                parameter.zero_()
        model.decoder.token_embedding.weight.copy_(embeddings)
        model.decoder.positional_embedding.copy_(positions)
        attention = model.decoder.blocks[-1].cross_attn
        heard = layer_norm(model.encoder.positional_embedding, [STATE])
        frames = [min(round(time * FRAMES_PER_SECOND), 1499) for time in times]
        queries = layer_norm(positions[len(start) : len(start) + len(times)], [STATE])
        attention.query.weight.copy_(4 * torch.linalg.lstsq(queries, heard[frames]).solution.T)
        attention.query.bias.zero_()
        attention.key.weight.copy_(torch.eye(STATE))
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, path)


def _token_times(tokenizer, text: str) -> list[float]:
    """Return the start of each token that is no timestamp, and the end of the last one."""
    times, end = [], 0.0
    for first, words, last in re.findall(r"<\|([\d.]+)\|>([^<]+)<\|([\d.]+)\|>", text):
        count, begin, end = len(tokenizer.encode(words)), float(first), float(last)
        times += [begin + number * (end - begin) / count for number in range(count)]
    return [*times, end]
