"""The public captioning benchmarks of `salmonn eval`: how captions are made, judged and averaged for each.

To add one, write its reader, judge and rates in a separate file, and an entry in `BENCHMARKS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmonn.score import autodq, cloze, description_ratings, event_recall
from salmonn.score.benchmark_items import BenchmarkVideo
from salmonn.score.formats import read_references


@dataclass(frozen=True)
class Benchmark:
    """A public captioning benchmark.

    Args:
        title: name and source.
        file: its file of annotations.
        judge: language model that judged published results.
        read: reads the annotations.
        prompt: prompt for the captioner from the annotations; None where each model has its own.
        modality: what the captioner is given.
        folder: folder of the videos from the path of the annotations; None where it has to be named.
        score_one: scores a caption; None for the test set, which `salmonn score` scores.
        rates: averages of scores by row.
        columns: column of the table -> field of the rates; a heading that ends in "%" has shares.
    """

    title: str
    file: str
    judge: str
    read: Callable[[Path], Sequence[BenchmarkVideo]]
    prompt: Callable[[Path], str] | None = None
    modality: str = "both"
    folder: Callable[[Path], Path] | None = lambda path: path.parent
    score_one: Callable[..., Any] | None = None
    rates: Callable[..., Mapping[str, Any]] = lambda scores: {}
    columns: Mapping[str, str] | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "testset": Benchmark(
        "video-SALMONN 2 test set (arXiv 2506.15220)", "video_salmonn2_test.json", "gpt-3.5-turbo-0125",
        read=lambda path: list(read_references(path).values()),
    ),
    "dream1k": Benchmark(
        "DREAM-1K (arXiv 2407.00634)", "DREAM-1k.jsonl", "gpt-35-turbo-0125",
        read=autodq.read_dream, prompt=lambda _: autodq.PROMPT, modality="visual",
        score_one=autodq.judge_dream, rates=autodq.compute_dream_rates,
        columns={"F1 %": "f1", "recall %": "recall", "precision %": "precision", "videos": "num_videos"},
    ),
    "omnicloze": Benchmark(
        "Omni-Cloze (arXiv 2510.12720)", "omni_cloze.jsonl", "gpt-4o-2024-11-20 (VLMEvalKit)",
        read=cloze.read_cloze, score_one=cloze.judge_cloze, rates=cloze.compute_cloze_rates,
        columns={
            "accuracy %": "accuracy", "not given %": "not_given", "wrong %": "wrong", "score %": "score",
            "blanks": "num_blanks",
        },
    ),
    "avscapbench": Benchmark(
        "AVSCapBench (arXiv 2607.12820)", "metadata/OmniCaption.json", "gemini-3.1-pro",
        read=event_recall.read_checklists, folder=lambda path: path.parent.parent / "videos",
        score_one=event_recall.judge_checklist, rates=event_recall.compute_recall_rates,
        columns={
            "recall %": "recall", "of videos with such events %": "recall_where_present", "events": "num_events",
            "videos": "num_videos",
        },
    ),
    "ugc": Benchmark(
        "UGC-VideoCap (arXiv 2507.11336)", "final_caption_qa.json", "gpt-4o",
        read=description_ratings.read_descriptions, prompt=description_ratings.read_prompt, folder=None,
        score_one=description_ratings.judge_description, rates=description_ratings.compute_rating_rates,
        columns={"rating %": "rate", "videos": "num_videos"},
    ),
}  # fmt: skip
