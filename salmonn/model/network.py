"""The audio-visual language model: towers encode clips to tokens that are inserted into the decoder's text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from salmonn.model.attention import AttentionBackend, PackedAttention, PrefillAttention, use_packed_attention
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.kv_cache import KVCache
from salmonn.model.layout import ClipInputs, Layout, ModelInputs, insert_clip_tokens
from salmonn.model.packing import PackedBatch, pack
from salmonn.model.pooling import AnswerStates, Pooling, pool_last, pool_mean, pool_rich, upper_layers

MAX_LOGIT_BYTES = 256 << 20
UNUSED_WEIGHTS = (r"post_layernorm", r"position_ids")  # of published towers, whose features do not depend on them
# More tokens take memory and are not faster. On a CPU they are slower by a sixth: the allocator returns tensors of that
# size to the system, and every page has to be mapped again.
PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS_CPU = 8192, 1024

DecodeFunction = Callable[[Tensor, Tensor, AttentionBackend], Tensor]


@dataclass(frozen=True)
class Embedded:
    """Embedded text with the tokens of clips.

    Args:
        embeds: (B, L, D).
        is_clip: (B, L) true for the N clip tokens; None if there are none.
        deep: (N, D) for each of the decoder's first layers: what is added to the clip tokens' hidden states after it.
    """

    embeds: Tensor
    is_clip: Tensor | None = None
    deep: Sequence[Tensor] = ()

    def decoder_inputs(self) -> dict[str, Any]:
        """Return the arguments of a decoder of transformers."""
        inputs: dict[str, Any] = dict(inputs_embeds=self.embeds)
        if self.deep:
            inputs |= dict(visual_pos_masks=self.is_clip, deepstack_visual_embeds=list(self.deep))
        return inputs


class Network(PreTrainedModel):
    """Vision tower, audio tower and decoder of any family.

    Args:
        config: sizes and family.

    Attributes:
        max_logit_bytes: size of the logits that are held at once in training; None for no limit.
        prefill_chunk_tokens: number of prompt tokens that go through the decoder together, unless one clip has more.
        head: head of a reward model, which reads `AnswerStates`; None for a captioner. As a part of the network it is
            trained, sharded and checkpointed with it.
    """

    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: SalmonnConfig) -> None:
        super().__init__(config)
        self.family = get_family(config)
        self._keys_to_ignore_on_load_unexpected = [*UNUSED_WEIGHTS, *self.family.ignored_weights]
        # The language model is that of transformers, or PEFT's wrapper while an adapter is attached.
        self.vision, self.audio, self.lm = self.family.build_parts(attn_implementation=config._attn_implementation)
        self.max_logit_bytes: int | None = MAX_LOGIT_BYTES
        self._prefill_chunk_tokens: int | None = None
        self.head: nn.Module | None = None
        # Layers that device_map "auto" keeps whole; transformers adds those of the language model.
        towers = [tower for tower in (self.vision, self.audio) if tower is not None]
        layers = (name for tower in towers for name in tower.encoder._no_split_modules or ())  # type: ignore[union-attr]
        self._no_split_modules = ["Blip2QFormerLayer", *layers]
        use_packed_attention(self.lm.get_decoder().config)
        self.post_init()

    @property
    def prefill_chunk_tokens(self) -> int:
        """Number of tokens in a chunk of `prefill`; the default depends on the device."""
        default = PREFILL_CHUNK_TOKENS_CPU if self.device.type == "cpu" else PREFILL_CHUNK_TOKENS
        return self._prefill_chunk_tokens or default

    @prefill_chunk_tokens.setter
    def prefill_chunk_tokens(self, count: int) -> None:
        self._prefill_chunk_tokens = count

    def checkpoint_layers(self, layers: bool | int) -> None:
        """Set gradient checkpointing: in training, keep only the inputs of layers, and recompute the rest.

        Args:
            layers: all layers, none, or all of the towers and at most this number of the language model's.
        """
        exempt = [] if isinstance(layers, bool) else list(self.lm.get_decoder().layers)[layers:]
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = bool(layers) and module not in exempt
                # Not reentrant, so that gradients reach an adapter although no input of its layer requires any.
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def encode(self, clips: Sequence[ClipInputs], layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
        """Encode clips to their tokens in the order of their layouts, (N_i, (1 + K) D) for each clip."""
        with_video = [clip for clip in clips if clip.num_frames]
        with_audio = [clip.mel for clip in clips if len(clip.mel)]
        pixels, grids = [clip.pixels for clip in with_video], [clip.grid for clip in with_video]
        visual = iter(self.vision(pixels, grids) if with_video else [])
        audio = iter(self.audio(with_audio) if self.audio is not None and with_audio else [])
        # Not made from the embeddings: where these are offloaded, their weight is on no device between two calls.
        empty = torch.zeros(0, self.feature_width, dtype=self.dtype, device=self.device)
        return self.arrange_features(
            [next(visual) if clip.num_frames else empty for clip in clips],
            [next(audio) if len(clip.mel) else empty for clip in clips],
            layouts,
        )

    def arrange_features(
        self, visual: Sequence[Tensor], audio: Sequence[Tensor], layouts: Sequence[Layout]
    ) -> tuple[Tensor, ...]:
        """Put the tokens of each clip in the order of its layout: visual (V_i, (1 + K) D), audio (A_i, D) and text.

        Tokens without deep features get zeros in their place.
        """
        embed = self.lm.get_input_embeddings()
        arranged = []
        for visual_tokens, audio_tokens, layout in zip(visual, audio, layouts, strict=True):
            timestamps = embed(torch.tensor(layout.timestamp_ids, dtype=torch.long, device=self.device))
            zeros = timestamps.new_zeros(1, timestamps.shape[-1])
            # In a model that is split over devices, the towers are not on the device of the embeddings.
            tokens = torch.cat(
                [
                    F.pad(part.to(timestamps), (0, self.feature_width - part.shape[-1]))
                    for part in (visual_tokens, audio_tokens, timestamps, zeros)
                ]
            )
            arranged.append(tokens.index_select(0, layout.order.to(tokens.device)))
        return tuple(arranged)

    @property
    def feature_width(self) -> int:
        """Width (1 + K) D of the clips' tokens, see `ClipFeatures`."""
        return int(self.lm.get_input_embeddings().embedding_dim * (1 + self.family.num_deep_layers))

    def embed(self, inputs: ModelInputs) -> Tensor:
        """Embed text and insert the clips' tokens, (B, L, D)."""
        return self._embed(inputs, inputs.input_ids, inputs.clip_index).embeds

    def _embed(self, inputs: ModelInputs, ids: Tensor, clip_index: Sequence[int]) -> Embedded:
        """Embed `ids` (B, L), in which the clips `clip_index` follow each other."""
        clips = list(dict.fromkeys(clip_index))
        if inputs.clip_features:
            features = [inputs.clip_features[clip] for clip in clips]
        else:
            features = list(
                self.encode([inputs.clip_inputs[clip] for clip in clips], [inputs.layouts[clip] for clip in clips])
            )
        is_clip = torch.isin(ids, torch.tensor(self.config.placeholder_ids, device=ids.device))
        # A placeholder may be outside the vocabulary.
        embeds = self.lm.get_input_embeddings()(ids.masked_fill(is_clip, 0))
        by_clip = dict(zip(clips, features, strict=True))
        tokens = torch.cat(
            [embeds.new_zeros(0, self.feature_width), *(by_clip[clip].to(embeds.device) for clip in clip_index)]
        )
        first, *deep = tokens.split(embeds.shape[-1], dim=-1)
        # In a model that is split over devices, the embeddings may be on another device than the ids.
        is_clip = is_clip.to(embeds.device)
        return Embedded(insert_clip_tokens(embeds, is_clip, first), is_clip, deep)

    def forward(
        self, inputs: ModelInputs, *, distributions: bool = False, pooling: Pooling | Literal["tokens"] | None = None
    ) -> Tensor | AnswerStates:
        """Compute the log-probability of every label, or the states of the answers; rows are padded on the right.

        The common prefix of a clip's rows, above all the clip's tokens, goes through the decoder once. Logits are
        computed only for positions with a label, a few at a time.

        Args:
            inputs: the batch.
            distributions: return the log-probabilities of the whole vocabulary for each label. An argument of `forward`
                and not another method, since wrappers for several GPUs act when the network is called.
            pooling: return the states of the answers, which are the labels, or what the head computes from them;
                "tokens" for those of each of their N tokens, row by row.

        Returns:
            (B, L - 1): at [b, i] log p(labels[b, i + 1] | tokens before it), 0 where there is no label; or
            (N, V): for each of the N labels, row by row, log p(token | tokens before the label); or
            `AnswerStates` of the rows, or the head's output.
        """
        packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index)
        if pooling:
            states = self._answer_states(inputs, packed, pooling)
            return states if self.head is None else self.head(states)
        hidden = self._run_packed(inputs, packed, PackedAttention(packed))
        # In a model that is split over devices, the output is on the last of them.
        targets = inputs.labels[:, 1:].to(hidden.device)
        has_label = targets != -100
        indices = packed.destination[:, :-1].to(hidden.device)[has_label]
        # Rows share the last token of their prefix. Indexing would add up its gradients in the order of threads.
        predicting = hidden.index_select(0, indices)
        if distributions:
            return self._logits(predicting).log_softmax(-1)
        logps = self._label_logps(predicting, targets[has_label])
        return logps.new_zeros(targets.shape).masked_scatter(has_label, logps)

    def _answer_states(
        self, inputs: ModelInputs, packed: PackedBatch, pooling: Pooling | Literal["tokens"]
    ) -> AnswerStates:
        """Pool the hidden states of each row's answer. They are found by their places, not by looking for padding."""
        backend = PackedAttention(packed)
        if pooling in ("rich", "tokens"):
            # The embeddings and the output of each layer, (T, D) each; the last is normed.
            output = self._decode(*self._embed_packed(inputs, packed), backend, output_hidden_states=True)
            layers = [layer[0] for layer in output.hidden_states]
        else:
            layers = [self._run_packed(inputs, packed, backend)]
        hidden = layers[-1]
        is_answer = (inputs.labels != -100).to(hidden.device)
        lengths = is_answer.sum(1).tolist()
        if not all(lengths):
            raise ValueError("a row has no answer, whose states could be pooled; give each row one")
        destination = packed.destination.to(hidden.device)
        is_before = torch.cat([is_answer[:, 1:], torch.zeros_like(is_answer[:, :1])], dim=1)
        first = is_before.int().argmax(1)  # column of the last token of each prompt
        prompt = hidden.index_select(0, destination.gather(1, first.unsqueeze(1)).squeeze(1)).float()
        places = destination[is_answer]
        states = hidden.index_select(0, places).float()
        if pooling not in ("rich", "tokens"):
            return AnswerStates(prompt, (pool_last if pooling == "last" else pool_mean)(states, lengths))
        predicting = hidden.index_select(0, destination[is_before])
        figures = self._logp_figures(predicting, inputs.labels.to(hidden.device)[is_answer])
        upper = [layers[number].index_select(0, places).float() for number in upper_layers(len(layers) - 1)]
        if pooling == "tokens":
            return AnswerStates(prompt, torch.cat([*upper, states, *(one.unsqueeze(1) for one in figures)], dim=1))
        return AnswerStates(prompt, pool_rich(states, upper, *figures, lengths=lengths))

    def _logp_figures(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of targets (N,) after hidden states (N, D), and the entropies there, (N,) each."""
        limit, row_bytes = self.max_logit_bytes, 4 * self.lm.get_output_embeddings().out_features
        size = max(1, len(targets)) if limit is None else max(1, limit // row_bytes)
        logps, entropies = [], []
        for part, ids in zip(hidden.split(size), targets.split(size), strict=True):
            distribution = self._logits(part).log_softmax(-1)
            logps.append(distribution.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
            entropies.append(-(distribution.exp() * distribution).sum(-1))
        return torch.cat(logps), torch.cat(entropies)

    def prefill(self, inputs: ModelInputs) -> tuple[Tensor, KVCache, list[int]]:
        """Run prompts through the decoder.

        Args:
            inputs: B rows, padded on the right.

        Returns:
            (B, V) logits of the token after each row, the KV cache for `decode_step`, and the index of each row: logits
            and cache are in the order in which rows were packed.
        """
        packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index, min_suffix=1)
        cache = KVCache(packed, inputs.position_ids.flatten(1)[:, packed.source].unsqueeze(1))
        last_hidden = []
        for chunk in packed.chunks(self.prefill_chunk_tokens):
            hidden = self._run_packed(inputs, chunk, PrefillAttention(chunk, cache))
            last_hidden.append(hidden[chunk.row_ends.to(hidden.device)])
        cache.finalize()
        return self._logits(torch.cat(last_hidden)), cache, packed.row_order

    def decode_step(
        self, tokens: Tensor, cache: KVCache, *, num_waiting: int = 0, layers: DecodeFunction | None = None
    ) -> Tensor:
        """Run one more token (R,) of each cached row through the decoder.

        Args:
            tokens: (R,) token ids.
            cache: KV cache of the R rows.
            num_waiting: number of rows at the end that have no token yet; what is computed for them has no effect.
            layers: see `decode_tokens`.

        Returns:
            (R, V) logits of the tokens after these.
        """
        positions = cache.advance(num_waiting=num_waiting)
        if not (num_padding := positions.shape[1] - len(tokens)):
            return self.decode_tokens(tokens, positions, cache, layers=layers)
        return self.decode_tokens(F.pad(tokens, (0, num_padding)), positions, cache, layers=layers)[: len(tokens)]

    def decode_tokens(
        self, tokens: Tensor, positions: Tensor, cache: KVCache, *, layers: DecodeFunction | None = None
    ) -> Tensor:
        """Compute the logits (R, V) after tokens (R,) at positions (3, R, 1), in a step of the cache that began.

        Args:
            tokens, positions, cache: see above.
            layers: runs embedded tokens (R, D) through the layers, in place of the decoder's forward.
        """
        embeds = self.lm.get_input_embeddings()(tokens)
        if layers is not None:
            return self._logits(layers(embeds, positions, cache))
        return self._logits(self._run_decoder(Embedded(embeds.unsqueeze(1)), positions, cache)[:, 0])

    def _run_packed(self, inputs: ModelInputs, packed: PackedBatch, backend: AttentionBackend) -> Tensor:
        """Return the hidden states of a packed sequence, (T, D)."""
        return self._run_decoder(*self._embed_packed(inputs, packed), backend)[0]

    def _embed_packed(self, inputs: ModelInputs, packed: PackedBatch) -> tuple[Embedded, Tensor]:
        """Return the embedded tokens (1, T) and the positions (3, 1, T) of a packed sequence."""
        ids = inputs.input_ids.flatten()[packed.source].unsqueeze(0)
        embeds = self._embed(inputs, ids, [group.clip for group in packed.groups])
        return embeds, inputs.position_ids.flatten(1)[:, packed.source].unsqueeze(1)

    def _run_decoder(self, embedded: Embedded, position_ids: Tensor, backend: AttentionBackend) -> Tensor:
        """Run embedded tokens (B, L) at positions (3, B, L) through the decoder, (B, L, D)."""
        hidden: Tensor = self._decode(embedded, position_ids, backend).last_hidden_state
        return hidden

    def _decode(self, embedded: Embedded, position_ids: Tensor, backend: AttentionBackend, **options: bool) -> Any:
        return self.lm.get_decoder()(
            # Transformers takes a mask of four dimensions as it is instead of making one; the backend ignores it.
            attention_mask=embedded.embeds.new_zeros(1, 1, 1, 1),
            position_ids=self.family.rotary_positions(position_ids),
            use_cache=False,
            backend=backend,
            **embedded.decoder_inputs(),
            **options,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm.get_output_embeddings()(hidden).float()
        return logits

    def _label_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities (N,) of targets (N,) after hidden states (N, D).

        A vocabulary is far wider than a model. Beyond one chunk, logits are recomputed for the gradient, not kept.
        """
        limit, row_bytes = self.max_logit_bytes, 4 * self.lm.get_output_embeddings().out_features
        size = len(targets) if limit is None else max(1, limit // row_bytes)
        if len(targets) <= size:
            return self._logps_of_chunk(hidden, targets)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(self._logps_of_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    def _logps_of_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(hidden)
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


AutoModel.register(SalmonnConfig, Network)
