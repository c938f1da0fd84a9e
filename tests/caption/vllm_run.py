"""Captions by vLLM for tests/caption/test_real_vllm_captioner.py, which runs this file in the environment of vLLM.

python vllm_run.py MODEL MAX_MODEL_LEN VIDEO...
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from salmonn.caption.generator import CachedGenerator, CaptionRequest, Sampling, Span
from salmonn.caption.vllm_captioner import load_vllm

SAMPLING = Sampling(max_new_tokens=16, logprobs=2, repetition_penalty=1.0)
CASES = {
    "greedy": SAMPLING,
    "penalized": replace(SAMPLING, repetition_penalty=1.5),
    "stopped": replace(SAMPLING, stop=("no such text", "e")),
}
SAMPLED = replace(SAMPLING, temperature=1.0, top_p=0.9)


def main(model: str, max_model_len: str, *videos: str) -> None:
    """Print the captions of each case as one JSON object."""
    captioner = load_vllm(model, batch_size=4, arguments=dict(max_model_len=int(max_model_len), enforce_eager=True))
    paths = [Path(video) for video in videos]
    cases = {
        name: captioner.generate([CaptionRequest(path, sampling=sampling) for path in paths])
        for name, sampling in CASES.items()
    }
    samples = [CaptionRequest(path, sampling=SAMPLED, seed=7, num_samples=4) for path in paths]
    cases["samples"] = captioner.generate(samples)
    # As training samples: clips have been encoded before.
    clips = dict(zip(paths, captioner.encode([captioner._read(one) for one in samples]), strict=True))
    cases["cached"] = CachedGenerator(captioner, clips).generate(list(reversed(samples)))[::-1]
    cases["greedy samples"] = captioner.generate([replace(one, sampling=SAMPLING) for one in samples])
    # The prompt asks for more tokens than vLLM's limit, but the first second does not.
    long = CaptionRequest(paths[0], prompt="Tell " * int(max_model_len), sampling=SAMPLING)
    short = CaptionRequest(paths[0], sampling=SAMPLING, span=Span(0.0, 1.0))
    cases["too long"] = [list(captioner.caption_many([short, long, short]))]
    results = {name: [[asdict(one) for one in of_clip] for of_clip in clips] for name, clips in cases.items()}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
