"""Log-probabilities of the reference policy: computed once for each pair, and again if anything has changed."""

from dataclasses import replace

import pytest
import torch

from salmonn.files import read_json, write_json
from salmonn.model.lora import attach_lora
from salmonn.train.loop import autocast
from salmonn.train.reference_logps import REFERENCE_LOGPS_NAME, compute_reference_logps
from tests.train.preference_batches import LORA, answer_logp, reference_logps, to_examples


def test_reference_is_the_network_without_adapter(captioner, fill_adapter, pairs, features_by_video):
    expected = [
        [answer_logp(captioner, pair, text, features_by_video[pair.video]) for text in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    attach_lora(captioner.network, LORA, seed=0)
    fill_adapter(captioner.network)
    captioner.network.eval()
    computed = reference_logps(captioner, to_examples(pairs, features_by_video))
    assert len(computed) == 3
    for pair, reference, by_hand in zip(pairs, computed, expected, strict=True):
        assert reference == pytest.approx(by_hand, rel=1e-5)
        assert answer_logp(captioner, pair, pair.chosen, features_by_video[pair.video]) != pytest.approx(
            by_hand[0], rel=1e-3
        )


def test_pairs_on_one_clip_are_batched(captioner, pairs, features_by_video, monkeypatch):
    """The clip's tokens are in the batch once, and every answer has its own log-probability."""
    four_pairs = [pairs[0], pairs[1], replace(pairs[0], prompt="Tell more.", chosen="two"), pairs[2]]
    expected = [
        [answer_logp(captioner, pair, text, features_by_video[pair.video]) for text in (pair.chosen, pair.rejected)]
        for pair in four_pairs
    ]
    attach_lora(captioner.network, LORA, seed=0)
    batches: list = []
    forward = captioner.network.forward
    monkeypatch.setattr(captioner.network, "forward", lambda inputs: batches.append(inputs) or forward(inputs))
    computed = reference_logps(captioner, to_examples(four_pairs, features_by_video), batch_size=9)
    assert [logp for values in computed for logp in values] == pytest.approx(
        [logp for values in expected for logp in values], rel=1e-5
    )
    (inputs,) = batches
    assert len(inputs.clip_features) == 3 and len(inputs.input_ids) == 8


@pytest.fixture
def run_reference(captioner, fill_adapter, pairs, features_by_video, tmp_path, monkeypatch):
    """Compute reference log-probabilities in batches of one pair; return them and the number of forward passes."""
    attach_lora(captioner.network, LORA, seed=0)
    fill_adapter(captioner.network)
    captioner.network.eval()
    runs, forward = [], captioner.network.forward
    monkeypatch.setattr(captioner.network, "forward", lambda inputs: runs.append(inputs) or forward(inputs))

    def compute(other_pairs=None, other_features=None, *, size=1):
        runs.clear()
        computed = reference_logps(
            captioner,
            to_examples(other_pairs or pairs, other_features or features_by_video),
            batch_size=size,
            path=tmp_path / REFERENCE_LOGPS_NAME,
        )
        return computed, len(runs)

    return compute


def test_a_resumed_run_checks_only_a_sample(run_reference, tmp_path, caplog):
    expected, runs = run_reference()
    assert runs == 3
    first = (tmp_path / REFERENCE_LOGPS_NAME).read_bytes()
    cached, runs = run_reference()
    assert cached == expected and runs == 1 and (tmp_path / REFERENCE_LOGPS_NAME).read_bytes() == first
    cached, runs = run_reference(size=2)  # other batches may differ by rounding; the cached values are used
    assert cached == expected and runs == 1 and not caplog.records
    # Recomputation gives the same values, bit for bit.
    (tmp_path / REFERENCE_LOGPS_NAME).unlink()
    assert run_reference()[0] == expected and (tmp_path / REFERENCE_LOGPS_NAME).read_bytes() == first


def test_a_trained_adapter_does_not_change_the_reference(captioner, run_reference, fill_adapter):
    """The run may resume in the middle of training, or with a fresh adapter of another seed."""
    expected, _ = run_reference()
    with torch.no_grad():
        for name, value in captioner.network.named_parameters():
            if ".lora_" in name:
                value.add_(1)
    cached, runs = run_reference()
    assert cached == expected and runs == 1


def change_weights(captioner, pairs, features_by_video):
    with torch.no_grad():
        captioner.network.get_parameter("lm.base_model.model.model.norm.weight").mul_(1.5)


def change_frames(captioner, pairs, features_by_video):
    """Change all tokens slightly, which a sample might not detect."""
    for video, features in features_by_video.items():
        features_by_video[video] = replace(features, tokens=features.tokens + 1e-6)


def change_prompt(captioner, pairs, features_by_video):
    pairs[2] = replace(pairs[2], prompt="Tell all.")


def change_answer(captioner, pairs, features_by_video):
    pairs[2] = replace(pairs[2], rejected="no")


def change_history(captioner, pairs, features_by_video):
    pairs[2] = replace(pairs[2], history=(("Who?", "A star."),))


def change_order(captioner, pairs, features_by_video):
    pairs.reverse()


def change_system(captioner, pairs, features_by_video):
    captioner.processor.config.system_prompt = "Be brief."


@pytest.mark.parametrize(
    "change",
    [change_weights, change_frames, change_prompt, change_answer, change_history, change_order, change_system],
)
def test_changed_inputs_of_the_reference_are_recomputed(
    captioner, run_reference, pairs, features_by_video, caplog, tmp_path, change
):
    expected, _ = run_reference()
    change(captioner, pairs, features_by_video)
    recomputed, runs = run_reference()
    assert runs == 3 and recomputed != expected
    assert "is from different weights, clips, comparisons or tokens" in caplog.text
    assert run_reference() == (recomputed, 1)


def test_a_sample_that_differs_is_recomputed(run_reference, tmp_path, caplog):
    """A change that no hash detects, such as another version of torch; the first batch has the longest clip."""
    path = tmp_path / REFERENCE_LOGPS_NAME
    expected, _ = run_reference()
    values = read_json(path)
    write_json(
        path, values | {"logps": [{"chosen": chosen + 0.01, "rejected": rejected} for chosen, rejected in expected]}
    )
    cached, runs = run_reference()
    assert cached == expected and runs == 1 + 3 and "more than rounding error" in caplog.text
    assert read_json(path) == values


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 0, "fingerprint": "", "logps": []}'])
def test_an_unreadable_reference_is_recomputed(run_reference, tmp_path, caplog, text):
    expected, _ = run_reference()
    (tmp_path / REFERENCE_LOGPS_NAME).write_text(text)
    cached, runs = run_reference()
    assert cached == expected and runs == 3 and "recomputing" in caplog.text


def test_another_dtype_is_recomputed(run_reference):
    expected, _ = run_reference()
    with autocast("bfloat16"):
        rounded, runs = run_reference()
        assert runs == 3 and rounded != expected
        assert run_reference(size=2) == (rounded, 1)  # rounding differs more, but within the tolerance
    assert run_reference() == (expected, 3)


def test_an_end_changes_the_reference(run_reference, pairs, caplog):
    """Cached log-probabilities of finished answers are not those of unfinished ones."""
    finished, _ = run_reference()
    unfinished, runs = run_reference([replace(pair, rejected_finished=False) for pair in pairs])
    assert runs == 3 and "different" in caplog.text
    for cut, whole in zip(unfinished, finished, strict=True):
        assert cut[0] == pytest.approx(whole[0], rel=1e-5) and cut[1] > whole[1] + 1


def test_cached_logps_of_tokens_are_not_those_of_answers(captioner, pairs, features_by_video, tmp_path, caplog):
    attach_lora(captioner.network, LORA, seed=0)
    options = {"roles": ("chosen",), "batch_size": 3, "path": tmp_path / REFERENCE_LOGPS_NAME}
    examples = to_examples(pairs, features_by_video)
    sums = compute_reference_logps(captioner.network, examples, captioner.processor, **options)
    for _ in range(2):  # computed, then cached
        tokens = compute_reference_logps(captioner.network, examples, captioner.processor, per_token=True, **options)
        assert [sum(one["chosen"][0]) for one in tokens] == pytest.approx([one["chosen"] for one in sums])
    assert caplog.text.count("recomputing") == 1
