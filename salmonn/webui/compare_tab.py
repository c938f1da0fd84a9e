"""The tab Compare: two captions of one clip, blind; votes and edits become preference pairs."""

import random
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.caption.engine import CaptionRequest, Overloaded
from salmonn.caption.probe import MediaInfo
from salmonn.caption.streaming import Completion
from salmonn.preference.votes import Candidate, Choice, Vote, VoteMedia, now
from salmonn.records import Reference, Score
from salmonn.webui.controls import QUIET, add_controls, add_wanted, require_words
from salmonn.webui.rendering import show_empty, show_side, show_trouble
from salmonn.webui.scorer import right_caption
from salmonn.webui.session import ActiveRequest, ActiveRequests, AppState, random_seed, tell, to_caption
from salmonn.webui.sight import video_input

EMPTY = show_empty("Two captions, side by side", "Choose an example or drop a video, then press Compare.")
CHOICES: Mapping[Choice, str] = {
    "first": "A is better",
    "second": "B is better",
    "tie": "Tie",
    "both bad": "Both bad",
}
ASKED = '<p class="lead">Which one tells better what happens? Whose they are is told after the vote.</p>'
WRITING = '<p class="lead busy">Two captions are being written</p>'
CONSENT = "Keep this video on the machine that runs this page, so that models can be trained on my vote"

Update = dict[Any, Any]


@dataclass(frozen=True)
class ScoredCandidate:
    """A caption with its score, where there is a reference."""

    candidate: Candidate
    score: Score | None = None


@dataclass(eq=False)
class ComparisonState:
    """What is compared; `claim` lets one vote through."""

    first: ScoredCandidate
    second: ScoredCandidate
    query: CaptionRequest
    outline: MediaInfo
    reference: Reference | None
    _free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))

    def claim(self) -> bool:
        """Whether nobody has voted on it yet."""
        return self._free.acquire(blocking=False)

    def __deepcopy__(self, memo: object) -> "ComparisonState":
        return self  # Gradio may copy what a visitor's state holds: the vote is one all the same


class CompareTab:
    """Lays the tab out and answers its visitors.

    Args:
        desk: what it works with.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.matches = list_matches(list(state.engines))
        self.turns = ActiveRequests()
        with gr.Row(elem_classes=["bench"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.video = video_input(state, place="compare")
                self.match = gr.Radio(
                    list(self.matches), value=next(iter(self.matches)), label="Compare",
                    visible=len(self.matches) > 1, elem_classes=["pills"],
                )  # fmt: skip
                asked = add_wanted()
                self.start = gr.Button("Compare", variant="primary", elem_id="compare")
                captioner = state.engines[state.first].captioner
                self.controls = add_controls(asked, captioner, temperature=0.8, is_seeded=False)
            with gr.Column(scale=6, min_width=320):
                self._add_ballot()
        self.duel = gr.State(None)
        self._wire()

    def _add_ballot(self) -> None:
        self.status = gr.HTML(EMPTY, elem_id="duel-status")
        with gr.Row(elem_classes=["sides"], equal_height=True):
            self.first = gr.HTML("", elem_id="first", visible=False)
            self.second = gr.HTML("", elem_id="second", visible=False)
        with gr.Column(visible=False, elem_classes=["ballot"]) as self.ballot:
            with gr.Accordion("What should it say? (optional)", open=False, elem_classes=["fold"]):
                self.edit = gr.Textbox(
                    label="What should it say?", show_label=False, lines=4, max_lines=12, elem_id="edit",
                    info="Your words are what the model learns as the truth beside the better caption.",
                )  # fmt: skip
                with gr.Row(elem_classes=["deeds"]):
                    self.from_first = gr.Button("Start from A", size="sm")
                    self.from_second = gr.Button("Start from B", size="sm")
            self.consent = gr.Checkbox(False, label=CONSENT, elem_id="consent", visible=False)
            with gr.Row(elem_classes=["votes"]):
                self.votes = {
                    choice: gr.Button(words, elem_classes=["vote"], min_width=120) for choice, words in CHOICES.items()
                }

    def _wire(self) -> None:
        inputs = {self.video, self.match, *self.controls.components}
        shown = [self.status, self.first, self.second, self.ballot, self.duel, self.start, self.edit]
        self.start.click(
            self.compare, inputs, [*shown, self.consent], show_progress="hidden", concurrency_limit=None,
            api_visibility="private",
        )  # fmt: skip
        self.video.change(self.leave, self.video, shown, **QUIET)
        for choice, button in self.votes.items():
            button.click(
                self._voter(choice), {self.duel, self.edit, self.consent}, shown,
                show_progress="hidden", concurrency_limit=None, api_visibility="private",
            )  # fmt: skip
        for button, side in ((self.from_first, "first"), (self.from_second, "second")):
            button.click(partial(_words_of, side), self.duel, self.edit, **QUIET)

    def compare(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Draw two captions, and show them on sides that are drawn, too."""
        if not values[self.video]:
            yield self._fail("choose an example, or drop a video of your own first")
            return
        path, visitor = Path(values[self.video]), str(request.session_hash)
        turn = self.turns.begin(visitor, path)
        try:
            models = self.matches[values[self.match]]
            query = replace(self.controls.query(values, path), seed=random_seed())
            if models[0] == models[1] and query.sampling and not query.sampling.temperature:
                raise ValueError(
                    "two draws of one model are the same at temperature 0: raise it under Span and sampling"
                )
            yield self._begin()
            duel = yield from self._draw(query, models, turn)
        except (ValueError, Overloaded, RuntimeError) as error:
            duel = None
            if not turn.is_over:
                yield self._fail(tell(error, path))
        if duel and not turn.is_over:
            self.state.uploads.hold(visitor, "duel", path)  # until the vote, whatever is chosen meanwhile
            yield self._show(duel)
        # By itself and last: whatever else became of it, the visitor can go on.
        yield {self.start: gr.update(interactive=True)}

    def _draw(
        self, query: CaptionRequest, models: tuple[str, str], turn: ActiveRequest
    ) -> Generator[Update, None, ComparisonState | None]:
        """Tells that it goes on; returns what is to be compared, None where nobody looks at it any more."""
        answers: dict[int, Completion] = {}
        with closing(self.state.stream_answers(query, models)) as coming:
            for come in coming:
                if turn.is_over:
                    return None
                if come is None:
                    yield {self.status: WRITING}
                elif come[1].answer is not None:
                    answers[come[0]] = come[1].answer
        return self._set_up(query, [(model, answers[place]) for place, model in enumerate(models)])

    def _set_up(self, query: CaptionRequest, answers: Sequence[tuple[str, Completion]]) -> ComparisonState:
        """The captions with their scores, on sides that are drawn."""
        outline = self.state.probe_media(query.path, model=answers[0][0])
        reference = self.state.reference_of(query.path) if query.prompt is None else None
        is_twice = answers[0][0] == answers[1][0]
        drawn = [
            self._score(model, answer, replace(query, seed=query.seed + number * is_twice), reference)
            for number, (model, answer) in enumerate(answers)
        ]
        random.SystemRandom().shuffle(drawn)
        return ComparisonState(drawn[0], drawn[1], query, outline, reference)

    def _score(
        self, model: str, answer: Completion, query: CaptionRequest, reference: Reference | None
    ) -> ScoredCandidate:
        """A caption, scored where there is a reference."""
        assert query.sampling is not None
        prompt = query.prompt or self.state.engines[model].captioner.default_prompt(query.modality)
        candidate = Candidate(model, answer.text, prompt, answer.finished, query.sampling.temperature, query.seed)
        if reference is None:
            return ScoredCandidate(candidate)
        try:
            _, score = self.state.scorer.score(to_caption(query, answer, model), reference, modality=query.modality)
        except ValueError:  # a vote counts without a score too
            return ScoredCandidate(candidate)
        return ScoredCandidate(replace(candidate, total=score.total), score)

    def _voter(self, choice: Choice) -> Callable[..., Update]:
        # Gradio hands a request to functions alone that name it, which a partial does not.
        def vote(values: Mapping[Any, Any], request: gr.Request) -> Update:
            return self.vote(choice, values, visitor=str(request.session_hash))

        return vote

    def vote(self, choice: Choice, values: Mapping[Any, Any], *, visitor: str) -> Update:
        """Keep a vote, then tell whose captions these are."""
        duel: ComparisonState | None = values[self.duel]
        if duel is None:
            return self._fail("the captions are gone: press Compare again")
        try:
            edit = require_words(values[self.edit] or "", name="what you wrote").strip()
            for engine in self.state.engines.values():
                engine.captioner.processor.check_prompt(edit)  # words that no model may be taught
        except ValueError as error:
            return {self.status: show_trouble(str(error).replace("the prompt", "what you wrote"))}
        if not duel.claim():
            return {self.status: '<p class="lead">Your vote was counted already.</p>'}
        query = duel.query
        may_keep = bool(values[self.consent]) or self.state.example_of(query.path) is not None
        span = query.span
        vote = Vote(
            now(), query.path.name, duel.first.candidate, duel.second.candidate, choice, query.modality,
            span.start_seconds if span else None, span.end_seconds if span else None, edit,
        )  # fmt: skip
        known = right_caption(duel.reference, query.modality) if duel.reference else ""
        try:
            vote = self.state.votes.add(vote, VoteMedia(query.path, duel.outline, may_keep, known))
        except OSError as error:
            return self._fail(f"the vote could not be kept: {tell(error, query.path)}")
        finally:
            self.state.uploads.hold(visitor, "duel", None)
        return self._reveal(duel, vote)

    def _begin(self) -> Update:
        return self.forget() | {
            self.status: '<p class="busy">The video is being read</p>',
            self.start: gr.update(interactive=False),
        }

    def _show(self, duel: ComparisonState) -> Update:
        is_own = self.state.example_of(duel.query.path) is None
        return {
            self.status: ASKED,
            self.first: gr.update(value=show_side("A", duel.first.candidate.text), visible=True),
            self.second: gr.update(value=show_side("B", duel.second.candidate.text), visible=True),
            self.ballot: gr.update(visible=True),
            self.consent: gr.update(visible=is_own, value=False),
            self.duel: duel,
            self.start: gr.update(interactive=True),
        }

    def _reveal(self, duel: ComparisonState, vote: Vote) -> Update:
        sides = {}
        for letter, name, component in (("A", "first", self.first), ("B", "second", self.second)):
            drawn: ScoredCandidate = getattr(duel, name)
            who = f"{drawn.candidate.model}, temperature {drawn.candidate.temperature:g}"
            sides[component] = show_side(
                letter, drawn.candidate.text, who=who, score=drawn.score, is_choice=vote.choice == name
            )
        return {
            **sides,
            self.status: f'<p class="verdict">{escape(tell_vote(vote))}</p>',
            self.ballot: gr.update(visible=False),
            self.duel: None,
            self.start: gr.update(value="Compare again", interactive=True),
            self.edit: "",
        }

    def _fail(self, words: str) -> Update:
        return self.forget() | {self.status: show_trouble(words)}

    def leave(self, path: str | None, request: gr.Request) -> Update:
        """After another video was chosen."""
        is_other = self.turns.turn_to(str(request.session_hash), path)
        return self.forget() if is_other else {self.status: gr.skip()}

    def forget(self) -> Update:
        """There is nothing to vote on."""
        return {
            self.status: EMPTY,
            self.first: gr.update(value="", visible=False),
            self.second: gr.update(value="", visible=False),
            self.ballot: gr.update(visible=False),
            self.duel: None,
            self.start: gr.update(value="Compare", interactive=True),
            self.edit: "",
        }


def list_matches(models: list[str]) -> dict[str, tuple[str, str]]:
    """What can be compared, by the words that visitors choose it by."""
    matches = {f"{models[0]} and {models[1]}": (models[0], models[1])} if len(models) == 2 else {}
    return matches | {f"Two draws of {model}": (model, model) for model in models}


def tell_vote(vote: Vote) -> str:
    """What became of a vote."""
    if vote.why_no_pair:
        return f"Your vote is kept. No model is trained on it: {vote.why_no_pair}."
    whose = {"edit": "your words", "reference": "the reference's caption", "chosen": "the better caption"}
    return f"Your vote is kept, as a pair to train on, with {whose[vote.ground_truth]} for the truth."


def _words_of(side: str, duel: ComparisonState | None) -> str:
    return getattr(duel, side).candidate.text if duel else ""
