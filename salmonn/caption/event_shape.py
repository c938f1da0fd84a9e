"""Captions in the form of events: requested by a JSON schema, checked, and requested once more where they are wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.shape import ONLY_CAPTION, CaptionShape, Dialogue, DialogueError, Question, Shape, ShapedText
from salmonn.records import Shaping
from salmonn.score.structured import StructureError, parse_structure, schema_text, structure_text

MAX_ANSWERS = 2
_MAX_NEW_TOKENS = 2048  # where a request has no limit
INSTRUCTIONS = """\
Reply with one JSON object: "scene" (where it is, who and what is there), "events" (what is seen happening and each \
sound except speech, with "text", "modality" visual or audio, "start_seconds" and "end_seconds"), "speech" (each line \
with "speaker", "words", "start_seconds" and "end_seconds"), "on_screen_text" (list), "camera" and "sound" (one \
sentence each). Times are seconds from the start of the clip, which is {duration} s long. Leave lists empty where \
there is nothing."""


@dataclass(frozen=True)
class EventsShape(CaptionShape):
    """A caption in the form of events.

    Args:
        schema: JSON schema that answers follow.
    """

    schema: str = ""

    @property
    def fields(self) -> set[str]:
        """See `CaptionShape`."""
        return {"duration"}

    @property
    def may_ask_again(self) -> bool:
        """See `CaptionShape`."""
        return True

    def dialogue(self, request: CaptionRequest, values: Mapping[str, str]) -> Dialogue:
        """See `CaptionShape`; raises a DialogueError if no answer is valid."""
        sampling = replace(
            request.sampling or Sampling(max_new_tokens=_MAX_NEW_TOKENS), json_schema=self.schema or schema_text()
        )
        prompt = f"{request.prompt or ''}\n{INSTRUCTIONS.format(duration=values['duration'])}".strip()
        question = replace(request, prompt=prompt, sampling=sampling)
        for number in range(1, MAX_ANSWERS + 1):
            answer = yield Question(question)
            if not answer.finished:
                raise DialogueError("its events were cut off at the token limit; increase it (--max-new-tokens)")
            try:
                structure = parse_structure(
                    answer.text,
                    start_seconds=request.span.start_seconds or 0.0,
                    seconds=float(values["duration"]),
                )
            except StructureError as error:
                fault = str(error)
            else:
                answer = replace(answer, structure=structure)
                return ShapedText(structure_text(structure), answer, prompt, Shaping(num_answers=number))
            history = (*question.history, (question.prompt or "", answer.text))
            again = f"This is not valid: {fault}. Write the whole JSON object again, without these faults."
            question = replace(question, prompt=again, history=history)
        raise DialogueError(f"its events are not valid after {MAX_ANSWERS} answers: {fault}")


def events_shape(schema: str = "") -> Shape:
    """Return the shape of captions in the form of events, for all that takes a `Shape`."""
    return Shape({ONLY_CAPTION: EventsShape(schema=schema)})
