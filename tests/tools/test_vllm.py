"""vLLM runs the language models of video-SALMONN 2 and 2+ on our towers' tokens, and generates what our engine does."""

import pytest
import torch

from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest, Sampling
from salmonn.caption.prompt import Prompt
from salmonn.caption.vllm_prompt import to_vllm_prompt
from salmonn.config import run_recipe
from salmonn.model.families.base import AUDIO_PAD, TURN_START, VIDEO_PAD


def test_a_prompt_has_the_clips_tokens_and_the_positions_of_all_tokens(plus, videos):
    (clip,) = plus.encode([plus._read(CaptionRequest(videos[0]))])
    prompt = to_vllm_prompt(plus, Prompt("Tell."), clip)
    fields, ids = prompt["multi_modal_data"]["video"], prompt["prompt_token_ids"]
    start, length = int(fields["clip_start"]), len(clip)
    positions = fields["prompt_positions"][0]
    assert torch.equal(fields["clip_tokens"][0], clip.tokens)
    start_of_turn, *placeholders = plus.processor.tokenizer.convert_tokens_to_ids([TURN_START, VIDEO_PAD, AUDIO_PAD])
    # vLLM's repetition penalty counts these.
    assert set(ids[start : start + length]) == {start_of_turn, *placeholders}
    assert not set(placeholders) & set(ids[:start] + ids[start + length :])
    assert torch.equal(positions[:, :start], torch.arange(start).expand(3, -1))
    assert torch.equal(positions[:, start : start + length], clip.layout.positions + start)
    assert (
        positions.shape == (3, len(ids)) and (positions[:, start + length] == start + clip.layout.next_position).all()
    )


@pytest.mark.parametrize("name", ["shipped", "random_plus"])
def test_vllm_generates_what_our_engine_generates(name, request, clips, load_tool, tmp_path, monkeypatch):
    """The shipped 2 instead of the random one, whose large weights amplify rounding errors of float32 to 5e-4."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed; it needs an environment of its own")
    from salmonn.caption.captioner import Captioner

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = SHIPPED_MODEL if name == "shipped" else request.getfixturevalue(name)
    tool = load_tool("export_lm")
    flags = ["--model", str(model), "--dtype", "float32", "--out", str(tmp_path / "lm")]
    run_recipe(tool.main, tool.ExportConfig, description="", args=flags)
    captioner = Captioner.load(model)
    sampling = Sampling(max_new_tokens=24, logprobs=0, repetition_penalty=1.0)
    paths = [clips.root / reference.video for reference in clips.references[:2]]
    requests = [CaptionRequest(path, prompt="Tell.", sampling=sampling) for path in paths]
    encoded = captioner.encode([captioner._read(one) for one in requests])
    runs = captioner.scheduler(captioner.limits(8)).run(captioner.groups(requests, encoded))
    ours = {sequence.index: completion for sequence, completion in runs}
    prompts = [
        to_vllm_prompt(captioner, captioner.resolve_prompt(one), clip)
        for one, clip in zip(requests, encoded, strict=True)
    ]
    architecture = {"architectures": ["SalmonnForCausalLM"]}
    llm = vllm.LLM(
        str(tmp_path / "lm"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_mm_embeds=True,
        max_model_len=512, max_num_seqs=2, hf_overrides=architecture,
    )  # fmt: skip
    end = captioner.processor.tokenizer.eos_token_id
    greedy = vllm.SamplingParams(temperature=0, max_tokens=24, logprobs=1, stop_token_ids=[end], detokenize=False)
    for index, output in enumerate(llm.generate(prompts, greedy)):
        (theirs,) = output.outputs
        assert list(theirs.token_ids) == [token.id for token in ours[index].tokens]
        for token, top in zip(ours[index].tokens, theirs.logprobs, strict=True):
            assert abs(token.logprob - top[token.id].logprob) < 1e-4
