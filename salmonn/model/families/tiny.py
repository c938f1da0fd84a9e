"""Sizes of the shipped toy model. It belongs to the family `Salmonn2`: the same code at a thousandth of the size."""

from salmonn.model.config import SalmonnConfig
from salmonn.model.families.salmonn2 import Salmonn2


def tiny_config(*, vocab_size: int, eos_token_id: int, pad_token_id: int) -> SalmonnConfig:
    """Return the config of the toy model: about 2 million parameters, clips of 8 s at 2 frames per second.

    Fresh weights have a standard deviation of about 1 / sqrt(width). The published 0.02 suits widths of thousands: at
    this size, Whisper's convolutions would output a hundredth of its fixed position embeddings, and the pitch would be
    lost.
    """
    std = 0.09
    # Whisper's decoder is never built, but transformers validates its config.
    whisper_decoder = dict(
        decoder_layers=1, vocab_size=vocab_size, decoder_start_token_id=pad_token_id, pad_token_id=pad_token_id,
        bos_token_id=pad_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    return SalmonnConfig(
        family=Salmonn2.name,
        lm=dict(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=4096, initializer_range=std, tie_word_embeddings=True,
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, bos_token_id=None,
        ),
        vision=dict(
            image_size=48, patch_size=16, hidden_size=96, intermediate_size=288, num_hidden_layers=3,
            num_attention_heads=4, vision_use_head=False,
        ),
        whisper=dict(
            num_mel_bins=40, max_source_positions=400, d_model=96, encoder_layers=2, encoder_attention_heads=4,
            encoder_ffn_dim=288, init_std=0.1, **whisper_decoder,
        ),
        qformer=dict(
            hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
            cross_attention_frequency=1, initializer_range=0.1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, encoder_hidden_size=96,
        ),
        pool=1,
        frames=dict(frames_per_second=2.0, max_frames=16, side=48),
        timestamp_tokens=False,
        system_prompt="",
        batch_size=32,  # a decode step of 32 clips takes little longer than of one
        initializer_range=std,
        tie_word_embeddings=True,
    )  # fmt: skip
