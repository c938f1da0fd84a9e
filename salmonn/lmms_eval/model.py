"""`Captioner` as a model of lmms-eval: `lmms-eval --model salmonn --model_args pretrained=FOLDER --tasks TASK`.

Each request is one question about one video or audio file; its frames and sound are read as everywhere in this project,
and not by lmms-eval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from lmms_eval.api.model import lmms

from salmonn import dist
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.media.frame_sampling import FrameOptions
from salmonn.model.loading import Placement
from salmonn.records import Failure, Modality

# Marks of media in the texts of tasks, which the chat format of the model writes itself.
_MARKS = ("<image>", "<video>", "<audio>")
# lmms-eval's default where a task says nothing: for few-shot prompts, and would end a caption at its first paragraph.
_FEW_SHOT_DELIMITER = "\n\n"


class SalmonnModel(lmms):
    """A model that `Captioner.load` loads; the arguments are those of --model_args.

    Args:
        pretrained: folder or hub id; "" for the toy model that is shipped.
        adapter: folder or hub id of a PEFT adapter.
        modality: what the model is given of a file with video and audio: both, visual or audio.
        num_frames: number of frames of each video (default: the model's own rule).
        batch_size: number of requests that are decoded together.
        max_batch_size: not used; lmms-eval passes it.
        on_failure: "raise" to stop at a file that cannot be read or answered, "empty" to answer it with an empty text.
        **placement: device, dtype and so on, see `Placement`.

    Raises:
        ValueError: there is no such model, or an argument is not valid.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        *,
        adapter: str | None = None,
        modality: Modality = "both",
        num_frames: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        on_failure: Literal["raise", "empty"] = "raise",
        **placement: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        if on_failure not in ("raise", "empty"):
            raise ValueError(f'on_failure must be "raise" or "empty", got {on_failure!r}')
        if dist.world_size() > 1:
            raise ValueError("the model salmonn runs in one process of lmms-eval; start one per GPU, on other tasks")
        if unknown := placement.keys() - {field.name for field in fields(Placement)}:
            raise ValueError(f"the model salmonn has no argument {', '.join(sorted(unknown))}")
        self.batch_size = int(batch_size)
        self._modality: Modality = modality
        self._frames = FrameOptions(num_frames=num_frames) if num_frames else None
        self._on_failure = on_failure
        self._captioner = Captioner.load(pretrained or SHIPPED_MODEL, placement=Placement(**placement), adapter=adapter)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request of lmms-eval, in their order.

        Raises:
            ValueError: a request is not about one video or audio file, has generation options that are not supported,
                or has a file that cannot be read and `on_failure` is "raise".
        """
        answers = []
        caption_requests = [self._to_request(*request.args) for request in requests]
        for request, result in zip(
            requests, self._captioner.caption_many(caption_requests, batch_size=self.batch_size), strict=True
        ):
            if isinstance(result, Failure):
                if self._on_failure == "raise":
                    raise ValueError(f"{result.reason} (on_failure=empty answers such files with an empty text)")
                answers.append("")
            else:
                answers.append(result.text)
            self.cache_hook.add_partial("generate_until", request.args[:2], answers[-1])
        return answers

    def _to_request(
        self, context: str, options: Mapping[str, Any], doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> CaptionRequest:
        media = doc_to_visual(self.task_dict[task][split][doc_id])
        if not isinstance(media, Sequence) or len(media) != 1 or not isinstance(media[0], str | Path):
            kinds = ", ".join(type(one).__name__ for one in media or ()) or "nothing"
            raise ValueError(
                f"{task}, document {doc_id}: the model salmonn takes the path of one video or audio file, and the task "
                f"gives {kinds}; choose a task on videos"
            )
        prompt = context
        for mark in _MARKS:
            prompt = prompt.replace(mark, "")
        return CaptionRequest(
            Path(media[0]),
            prompt.strip() or None,
            sampling=self._to_sampling(options),
            modality=self._modality,
            frames=self._frames,
        )

    def _to_sampling(self, options: Mapping[str, Any]) -> Sampling:
        """Return the sampling parameters of a task; the model's own are used where it sets none."""
        if (options.get("num_beams") or 1) > 1:
            raise ValueError(f"num_beams {options['num_beams']} is not supported; pass --gen_kwargs num_beams=1")
        own = self._captioner.default_sampling()
        temperature = float(options.get("temperature") or 0.0)
        do_sample = options.get("do_sample")
        if do_sample is None:
            do_sample = temperature > 0
        until = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        return Sampling(
            temperature=temperature if do_sample else 0.0,
            top_p=float(options.get("top_p") or 1.0),
            max_new_tokens=int(options.get("max_new_tokens") or own.max_new_tokens),
            repetition_penalty=own.repetition_penalty,
            stop=tuple(stop for stop in stops if stop and stop != _FEW_SHOT_DELIMITER),
        )

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: log-likelihoods of given answers are not computed here."""
        raise NotImplementedError(
            "the model salmonn generates answers and computes no log-likelihoods of given ones: choose tasks whose "
            "output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: tasks of several rounds are not supported."""
        raise NotImplementedError("the model salmonn answers one question at a time: choose tasks of one round")
