"""What all captioning benchmarks share: items, the captions of their videos, and a language model that judges each."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from salmonn.records import Caption, Unscored
from salmonn.score.chat_client import LLMRejectedError
from salmonn.score.judge import ProgressCallback
from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_judge import Attempt, InvalidReplyError, ask_with_retries

Reply = TypeVar("Reply")


class BenchmarkVideo(Protocol):
    """Item of a captioning benchmark; `video` is its file, relative to the folder of the videos."""

    @property
    def video(self) -> str:
        """File of the video."""


Item = TypeVar("Item", bound=BenchmarkVideo)
ItemScore = TypeVar("ItemScore")
# Asks the judge: system message, user message, JSON schema of the reply, parser that raises InvalidReplyError.
Ask = Callable[[str, str, dict[str, Any], Callable[[str], Any]], Any]


def match_captions(captions: Sequence[Caption], items: Sequence[BenchmarkVideo], folder: Path) -> dict[str, str]:
    """Return video of an item -> its caption; captions of other videos are left out.

    Args:
        captions: captions, whose videos are paths, or files as the benchmark names them.
        items: videos of the benchmark.
        folder: folder of the videos.

    Raises:
        ValueError: a video has several captions.
    """
    by_path = {os.path.normpath(folder / item.video): item.video for item in items}
    by_path |= {item.video: item.video for item in items}
    found = [(by_path.get(one.video) or by_path.get(os.path.normpath(one.video)), one.text) for one in captions]
    matched = [(video, text) for video, text in found if video is not None]
    result = dict(matched)
    if len(result) < len(matched):
        videos = "1 video" if len(result) == 1 else f"{len(result)} videos"
        raise ValueError(
            f"there are {len(matched)} captions of {videos}; the benchmark scores one caption of each whole video"
        )
    return result


def judge_items(
    items: Sequence[Item],
    captions: Mapping[str, str],
    judge: Callable[[Item, str, Ask], ItemScore],
    client: LLMClient,
    *,
    attempts: int = 3,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> tuple[list[ItemScore], list[Unscored]]:
    """Judge captions concurrently; a video without a caption, or without a usable reply, is not scored.

    Args:
        items: videos of the benchmark.
        captions: video -> caption.
        judge: function that scores an item's caption and asks the language model by its third argument.
        client: client of the judging language model.
        attempts: maximum number of requests for each question.
        seed: seed of the first request.
        progress: called with the number of videos just judged.
    """

    def ask(system: str, user: str, schema: dict[str, Any], parse: Callable[[str], Reply]) -> Reply:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return ask_with_retries(client, [Attempt(messages, schema, parse)] * attempts, seed=seed)

    def judge_one(item: Item) -> tuple[ItemScore | None, Unscored | None]:
        if not captions.get(item.video, "").strip():
            return None, Unscored(item.video, "it has no caption")
        try:
            return judge(item, captions[item.video], ask), None
        except (InvalidReplyError, LLMRejectedError) as error:
            return None, Unscored(item.video, str(error))

    results = client.map_concurrent(judge_one, items, progress=lambda _: progress(1) if progress else None)
    return (
        [score for score, _ in results if score is not None],
        [unscored for _, unscored in results if unscored is not None],
    )
