"""Parity with the published code on toy checkpoints in its format: features, positions, logits, tokens, losses.

The folder that PARITY_DIR names holds fixtures, one folder a model (default: shared/parity beside the repository).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from salmonn.caption.generator import Sampling
from salmonn.model.families.salmonn2 import interleave_by_frame
from salmonn.model.families.salmonn2_plus import interleave_by_time
from salmonn.model.layout import Layout, ModelInputs, text_positions
from salmonn.model.loading import load_network
from salmonn.model.lora import LoraConfig, attach_lora, set_adapter_weights
from salmonn.model.network import Network
from salmonn.preference.losses import LossConfig, RoleLogps, guided_loss
from tests.completions import generate
from tests.exactness import assert_close, assert_equal

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))
FOLDERS = sorted(PARITY_DIR.glob("*/cases.json")) if PARITY_DIR.is_dir() else []
NAMES = [(path.parent, case) for path in FOLDERS for case in json.loads(path.read_text()) if case != "preference"]
DIGITS = {str(digit): 20 + digit for digit in range(10)} | {".": 30}  # of the fixtures' toy vocabulary
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no parity fixtures in {PARITY_DIR}: set PARITY_DIR")


@dataclass
class Case:
    """One clip with its text, as model inputs, and the expected results."""

    network: Network
    tensors: dict[str, Tensor]
    inputs: ModelInputs
    visual: Tensor
    audio: Tensor
    facts: dict


@pytest.fixture(scope="module", params=NAMES, ids=lambda name: f"{name[0].name}-{name[1]}")
def case(request) -> Case:
    return make_case(load_network(request.param[0]), *request.param)


@torch.no_grad()
def make_case(network: Network, folder: Path, name: str) -> Case:
    facts = json.loads((folder / "cases.json").read_text())[name]
    every = load_file(folder / "cases.safetensors")
    tensors = {key.removeprefix(f"{name}."): value for key, value in every.items() if key.startswith(f"{name}.")}
    no_features = network.lm.get_input_embeddings().weight.new_zeros(0, network.lm.get_input_embeddings().embedding_dim)
    visual = audio = no_features
    if "audio_feature" in tensors:
        (audio,) = network.audio([tensors["audio_feature"]])
    ids = tensors["input_ids"]
    if network.config.family == "salmonn2":
        if "frames_uint8" in tensors:
            (visual,) = network.vision([tensors["frames_uint8"]], [])
        layout = layout_of_salmonn2(facts, num_visual=len(visual), num_audio=len(audio))
        index = int((ids[0] == -200).nonzero())
        ids = torch.cat([ids[:, :index], torch.full((1, len(layout)), -200), ids[:, index + 1 :]], dim=1)
    else:
        if "pixel_values_videos" in tensors:
            visual = network.vision.encode(tensors["pixel_values_videos"], tensors["video_grid_thw"].tolist())
        layout = layout_of_plus(network, facts, tensors, num_audio=len(audio))
    return Case(network, tensors, make_inputs(network, ids, layout, visual=visual, audio=audio), visual, audio, facts)


def layout_of_salmonn2(facts: dict, *, num_visual: int, num_audio: int) -> Layout:
    count, seconds = facts["num_frames"], facts["seconds"]
    times = [str(round((frame + 1) * seconds / count, 1)) for frame in range(count)] if not num_audio else []
    timestamp_ids = [[DIGITS[char] for char in time] for time in times]
    per_frame = num_visual // max(count, 1)
    return interleave_by_frame(
        count, per_frame, num_audio=num_audio, num_during_video=round(seconds * 50), timestamp_ids=timestamp_ids
    )


def layout_of_plus(
    network: Network, facts: dict, tensors: dict[str, Tensor], *, num_audio: int, published_positions: bool = False
) -> Layout:
    grid = None
    if "video_grid_thw" in tensors:
        merge = network.vision.encoder.spatial_merge_size
        steps, rows, columns = tensors["video_grid_thw"][0].tolist()
        grid = (steps, rows // merge, columns // merge)
    seconds = facts["second_per_grid_ts"]
    second_per_grid = seconds[0] if seconds else 0.0
    return interleave_by_time(
        grid, num_audio=num_audio, second_per_grid=second_per_grid, published_positions=published_positions
    )


def make_inputs(network: Network, ids: Tensor, layout: Layout, *, visual: Tensor, audio: Tensor) -> ModelInputs:
    mask = torch.ones_like(ids)
    is_clip = torch.isin(ids, torch.tensor(network.config.placeholder_ids))
    return ModelInputs(
        input_ids=ids,
        attention_mask=mask,
        position_ids=text_positions(is_clip, mask, [layout]),
        labels=torch.full_like(ids, -100),
        clip_index=(0,),
        layouts=(layout,),
        clip_features=network.arrange_features([visual], [audio], [layout]),
    )


def agree(case: Case, ours: Tensor, published: Tensor, *, what: str) -> None:
    assert_close(ours, published, of=case.network.config.family, what=what, atol=TOLERANCE)


@torch.no_grad()
def test_visual_features(case):
    if "video_embeds" in case.tensors:
        agree(case, case.visual, case.tensors["video_embeds"], what="visual features")
    elif "frame_tokens" in case.tensors:
        frames, tokens, width = case.tensors["frame_tokens"].shape
        side = int(tokens**0.5)
        rows = case.visual.reshape(frames, side, side + 1, width)
        agree(case, rows[:, :, :side].flatten(1, 2), case.tensors["frame_tokens"], what="visual features")
        assert (rows[:, :, side] == case.network.vision.newline).all()
        # The fixture keeps what the tower itself gives for the first frame.
        pixels = case.tensors["frames_uint8"][:1] / 127.5 - 1
        tower = case.network.vision.encoder(pixels).last_hidden_state
        agree(case, tower, case.tensors["vision_tower"], what="vision tower")
    else:
        assert len(case.visual) == 0


def test_audio_features(case):
    if "audio_embeds" in case.tensors:
        agree(case, case.audio, case.tensors["audio_embeds"], what="audio features")
    elif "audio_tokens" in case.tensors:
        published = case.tensors["audio_tokens"]
        # nothing is added to the first chunk
        agree(case, case.audio[: published.shape[1]], published[0], what="audio features")
    else:
        assert len(case.audio) == 0


@torch.no_grad()
def test_embeddings_and_positions(case):
    if "inputs_embeds" in case.tensors:
        agree(case, case.network.embed(case.inputs), case.tensors["inputs_embeds"], what="embeddings")
    if "position_ids" in case.tensors:
        ours, published = case.inputs.position_ids.tolist(), case.tensors["position_ids"].tolist()
        assert_equal(ours, published, of=case.network.config.family, what="positions")
    assert {"inputs_embeds", "position_ids"} & case.tensors.keys()


@torch.no_grad()
def test_logits(case):
    network, inputs = case.network, case.inputs
    logits = network.lm(
        inputs_embeds=network.embed(inputs),
        attention_mask=inputs.attention_mask,
        position_ids=network.family.rotary_positions(inputs.position_ids),
    ).logits
    agree(case, logits, case.tensors["logits"], what="logits")


def test_greedy_tokens(case):
    published = case.tensors["greedy"].tolist()
    # The published run did not stop at the end token.
    found = generated_ids(case.network, case.inputs, published)
    assert_equal(found, published, of=case.network.config.family, what="greedy tokens")


def generated_ids(network, inputs: ModelInputs, published: list[list[int]]) -> list[list[int]]:
    sampling = Sampling(max_new_tokens=len(published[0]))
    return [[token.id for token in row] for row in generate(network, inputs, sampling=sampling, stop_ids=[-1])]


def test_published_positions(case):
    if "position_ids_released_generate" not in case.tensors:
        pytest.skip("the published code computes no others of this case")
    network, ids = case.network, case.inputs.input_ids
    layout = layout_of_plus(network, case.facts, case.tensors, num_audio=len(case.audio), published_positions=True)
    is_clip = torch.isin(ids, torch.tensor(network.config.placeholder_ids))
    positions = text_positions(is_clip, torch.ones_like(ids), [layout])
    assert torch.equal(positions, case.tensors["position_ids_released_generate"])


@torch.no_grad()
@pytest.mark.parametrize("folder", [path.parent for path in FOLDERS], ids=lambda folder: folder.name)
def test_greedy_tokens_in_a_batch_of_different_lengths(folder):
    network = load_network(folder)
    names = [name for name in json.loads((folder / "cases.json").read_text()) if name != "preference"]
    cases = [make_case(network, folder, name) for name in names]
    inputs = pad_right([case.inputs for case in cases])
    assert len({case.inputs.input_ids.shape[1] for case in cases}) > 1
    published = [case.tensors["greedy"][0].tolist() for case in cases]
    assert generated_ids(network, inputs, published) == published


def pad_right(rows: list[ModelInputs]) -> ModelInputs:
    """Combine batches of one row."""
    width = max(row.input_ids.shape[1] for row in rows)

    def stack(name: str) -> Tensor:
        tensors = [getattr(row, name) for row in rows]
        return torch.cat([functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors], dim=-2)

    return ModelInputs(
        input_ids=stack("input_ids"),
        attention_mask=stack("attention_mask"),
        position_ids=stack("position_ids"),
        labels=stack("labels"),
        clip_index=tuple(range(len(rows))),
        layouts=tuple(row.layouts[0] for row in rows),
        clip_features=tuple(row.clip_features[0] for row in rows),
    )


@pytest.mark.parametrize("folder", [path.parent for path in FOLDERS], ids=lambda folder: folder.name)
class TestPreference:
    """Log-probabilities of three answers with the adapter enabled and disabled, and their losses."""

    @pytest.fixture
    def logps(self, folder) -> dict[str, Tensor]:
        facts = json.loads((folder / "cases.json").read_text())["preference"]
        network = load_network(folder)
        case = make_case(network, folder, facts["case"])
        every = load_file(folder / "cases.safetensors")
        config = LoraConfig(rank=facts["lora_r"], alpha=facts["lora_alpha"], dropout=0.0)
        attach_lora(network, config, seed=0)
        set_adapter_weights(network, load_file(folder / "lora.safetensors"))
        network.eval()
        found = {}
        for name in ("chosen", "rejected", "ground_truth"):
            answer = every[f"response.{name}"]
            ids = torch.cat([case.inputs.input_ids, answer], dim=1)
            inputs = make_inputs(network, ids, case.inputs.layouts[0], visual=case.visual, audio=case.audio)
            inputs.labels[:, -answer.shape[1] :] = answer
            with torch.no_grad():
                found[f"policy_logps.{name}"] = network(inputs)[:, -answer.shape[1] :]
                with network.lm.disable_adapter():
                    found[f"reference_logps.{name}"] = network(inputs)[:, -answer.shape[1] :]
        return found

    def test_log_probabilities(self, folder, logps):
        every = load_file(folder / "cases.safetensors")
        for name, ours in logps.items():
            assert_close(ours, every[name], of=folder.name, what="log-probabilities, LoRA on and off", atol=TOLERANCE)
        change = logps["policy_logps.chosen"] - logps["reference_logps.chosen"]
        assert change.abs().max() > TOLERANCE

    def test_losses(self, folder, logps):
        facts = json.loads((folder / "cases.json").read_text())["preference"]
        by_role = {}
        for role in ("chosen", "rejected", "ground_truth"):
            policy, reference = (logps[f"{name}.{role}"] for name in ("policy_logps", "reference_logps"))
            by_role[role] = RoleLogps(policy.sum(-1), torch.tensor([policy.shape[1]]), reference.sum(-1))
        loss = guided_loss(by_role, LossConfig(beta=facts["beta"], ce_weight=facts["ce_weight"]))
        assert loss.parts["dpo"].item() == pytest.approx(facts["dpo_loss"], abs=1e-5)
        assert loss.parts["ce"].item() == pytest.approx(facts["ce_loss"], abs=1e-5)
        assert loss.loss.item() == pytest.approx(facts["gdpo_loss"], abs=1e-5)
