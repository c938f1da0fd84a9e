"""The tab Caption: a video next to its caption, which is streamed, with its events, its score and further questions."""

import json
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.batch.subtitles import SUBTITLE_FORMATS, format_text
from salmonn.caption.engine import Overloaded
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.segments import SegmentRule
from salmonn.caption.streaming import Completion
from salmonn.media.container import ClipError
from salmonn.records import Caption, Reference
from salmonn.webui.chat import REMEMBER, ChatPanel, Conversation
from salmonn.webui.controls import (
    GENERATE,
    NO_VIDEO,
    QUIET,
    Update,
    check_text,
    clear_on_change,
    media_input,
    on_click,
    option_inputs,
    prompt_inputs,
)
from salmonn.webui.feedback_panel import FeedbackPanel, ShownCaption, check_rater, count, show_caption
from salmonn.webui.rendering import (
    plural,
    render_analysis,
    render_caption,
    render_downloads,
    render_error,
    render_file_notice,
    render_note,
    render_placeholder,
    render_reason,
    render_scored_caption,
    render_segments,
)
from salmonn.webui.scorer import parse_reference
from salmonn.webui.segments import SegmentList, join_captions, to_segment
from salmonn.webui.session import ActiveRequest, ActiveRequests, AppState, error_message, to_caption

logger = logging.getLogger(__name__)
READING, WRITING, CHOOSING = "Watching and listening", "Writing", "Choosing the best one"
SEGMENT_UPDATE_SECONDS = 0.2  # between two updates of a list of segments, which may be long
PLACEHOLDER = render_placeholder(
    "No caption yet",
    "Choose an example, or drop or record a video or sound, then press Describe. Formats your browser can't play work "
    "too.",
)
REFERENCE_INFO = (
    "What happens in the video, one event per line; a line may begin with “seen:”, “heard:” or “said:”. Or a reference "
    "as JSON."
)
FOR_YOU = "Captions for you", "The best of {} captions, by your votes under Compare"
BEST = "Best caption by reward", "The best of {} captions, by a reward model"
NOT_CHOSEN = "Segments and answers to questions are not chosen among several: describe the whole clip for that."
NOT_SCORED = "Captions by segment are not scored: choose the whole clip under Options."
COPY = "(shown) => { window.salmonn.copy('#answer'); return [shown]; }"
GET_RATER = "(isOn) => isOn ? window.salmonn.rater() : ''"
HISTORY = "() => window.salmonn.renderHistory()"
FORGET = "() => window.salmonn.forget()"


class CaptionTab:
    """Lays out the tab and handles its events.

    Args:
        state: the shared state.
    """

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.requests = ActiveRequests()
        with gr.Row(elem_classes=["columns"], equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_inputs()
            with gr.Column(scale=6, min_width=320):
                with gr.Column(elem_classes=["card"]):
                    self.answer = gr.HTML(PLACEHOLDER, elem_id="answer")
                    with gr.Row(elem_classes=["card-footer"]):
                        self.status = gr.HTML("", elem_id="status")
                        self.copy = gr.Button("Copy", elem_id="copy", size="sm", visible=False, scale=0, min_width=90)
                    self.reason = gr.HTML("", elem_id="reason")
                    self.downloads = gr.HTML("", elem_id="downloads")
                    self.chat = ChatPanel(state, self.requests)
                self.rating = FeedbackPanel(state)
                self.findings = gr.HTML("", elem_id="findings")
        with gr.Column(elem_id="earlier"):
            self.history = gr.HTML("", elem_id="history")
            self.forget = gr.Button("Clear history", size="sm", elem_id="clear-history")
        self.rater = gr.Textbox(visible=False)  # the browser's id, while captions for its user are wanted
        # Of an event in the browser. Gradio sorts inputs by their creation, and JavaScript expects this one last.
        self.time = gr.Number(visible=False)
        self._connect()
        self.rating.connect()

    def _add_inputs(self) -> None:
        state = self.state
        self.video = media_input(state, tab="caption")
        self.model = gr.Radio(
            list(state.engines), value=state.default_model, label="Model", visible=len(state.engines) > 1,
            elem_classes=["pills"],
        )  # fmt: skip
        prompt = prompt_inputs()
        label, info = FOR_YOU if state.chooser and state.chooser.is_personal else BEST
        num_samples = state.chooser.num_samples if state.chooser else 0
        self.for_you = gr.Checkbox(
            False, label=label, info=info.format(num_samples), elem_id="for-you", visible=state.chooser is not None
        )
        with gr.Row(elem_classes=["actions"]):
            self.start = gr.Button("Describe", variant="primary", elem_id="describe", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop", visible=False, scale=1)
        self.controls = option_inputs(prompt, state.engines[state.default_model].captioner, temperature=0.0)
        with gr.Accordion("Score against a reference", open=False, elem_classes=["fold"]):
            self.reference = gr.Textbox(
                label="Reference", info=REFERENCE_INFO, lines=4, max_lines=12, elem_id="reference"
            )

    def _connect(self) -> None:
        inputs = {
            self.video, self.model, self.reference, *self.controls.components, self.for_you, self.rater, self.time,
        }  # fmt: skip
        outputs = [
            self.answer, self.status, self.reason, self.findings, self.start, self.stop, self.copy, self.downloads,
            *self.chat.outputs, *self.rating.outputs,
        ]  # fmt: skip
        described = self.start.click(self.describe, inputs, outputs, js=on_click("caption", reveal=".card"), **GENERATE)
        described.then(None, self.chat.entry, self.history, js=REMEMBER, **QUIET)
        self.stop.click(self.stop_request, None, None, **QUIET)
        clear_on_change(self.video, self.time, self.requests, tab="caption", cleared=self._no_answer())
        if self.state.chooser and self.state.chooser.is_personal:
            self.for_you.change(None, self.for_you, self.rater, js=GET_RATER, **QUIET)
        self.copy.click(self.count_copy, self.rating.caption, [self.status, self.rating.caption], js=COPY, **QUIET)
        self.chat.connect(time=self.time, history=self.history)
        self.forget.click(None, None, self.history, js=FORGET, **QUIET)

    def describe(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Update]:
        """Stream a caption, then show its events and its score."""
        if not values[self.video]:
            yield self._show_error(NO_VIDEO)
            return
        path, model = Path(values[self.video]), values[self.model]
        active = self.requests.start(str(request.session_hash), path, clicked=values[self.time])
        try:
            caption_request = self.controls.to_request(values, path)
            rule = self.controls.segment_rule(values)
            pasted = check_text(values[self.reference] or "", name="the reference")
            reference = parse_reference(pasted, video=path.name) or self.state.reference_of(path)
            is_wanted = self.state.chooser is not None and values[self.for_you]
            is_best = is_wanted and rule is None and caption_request.prompt is None
            yield self._clear_answer()
            if is_best:
                rater = check_rater(values[self.rater])
                captions = yield from self._stream_best(caption_request, model, active, rater=rater)
            elif rule is None:
                captions = yield from self._stream(caption_request, model, active)
            else:
                captions = yield from self._stream_segments(caption_request, rule, model, active)
            if is_wanted and captions and not is_best:
                yield {self.reason: render_note(NOT_CHOSEN)}
            if captions and captions[0].text:
                yield from self._complete(captions, caption_request, reference, active, is_best=is_best)
        except (ValueError, Overloaded, RuntimeError) as error:
            if not active.is_cancelled:
                yield self._show_error(error_message(error, path))
        # In a separate update, so that it happens in any case.
        yield self._enable()

    def _clear_answer(self) -> Update:
        """Show that a request has begun."""
        return {
            self.answer: render_caption("", is_growing=True),
            self.status: _busy(READING),
            self.findings: "",
            self.downloads: "",
            self.start: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.copy: gr.update(visible=False),
        } | self._close()

    def _stream(
        self, caption_request: CaptionRequest, model: str, active: ActiveRequest
    ) -> Generator[Update, None, list[Caption]]:
        """Show the growing caption; return it, incomplete if it was stopped, or nothing if it was cancelled."""
        text, answer, seconds = "", None, 0.0
        for progress in self.state.stream_progress(caption_request, model, active):
            has_grown, text = progress.text != text, progress.text
            answer, seconds = progress.completion, progress.seconds
            if answer is None and not (active.is_stopped or active.is_cancelled):
                working = WRITING if has_grown else f"{WRITING if text else READING}, {seconds:.0f} s"
                grown = {self.answer: render_caption(text, is_growing=True)} if has_grown else {}
                yield grown | {self.status: _busy(working)}
        if active.is_cancelled:
            return []
        caption = to_caption(caption_request, answer or Completion(text.strip(), finished=False), model)
        status = [plural(len(caption.text.split()), "word"), escape(model), *([] if answer else ["stopped"])]
        yield {
            self.answer: render_caption(caption.text, finished=caption.finished or answer is None)
            + render_file_notice(caption),
            self.status: " · ".join([*status, f"{seconds:.1f} s"]),
            self.copy: gr.update(visible=bool(caption.text)),
        } | self._enable()
        return [caption]

    def _stream_best(
        self, caption_request: CaptionRequest, model: str, active: ActiveRequest, *, rater: str
    ) -> Generator[Update, None, list[Caption]]:
        """Generate several captions and show the best one for a person; return it, or nothing if it was stopped."""
        chooser, begin = self.state.chooser, time.monotonic()
        assert chooser is not None

        def show(num_words: int, seconds: float) -> Update:
            working = f"{WRITING} {chooser.num_samples} captions, {plural(num_words, 'word')}"
            return {self.status: _busy(f"{working if num_words else READING}, {seconds:.0f} s")}

        request = chooser.to_samples(caption_request)
        answers = yield from self.state.collect_answers(request, [model] * chooser.num_samples, active, show)
        if not answers:
            if not active.is_cancelled:
                yield self._no_answer() | {self.status: "stopped"}
            return []
        yield {self.status: _busy(CHOOSING)}
        captions = [replace(to_caption(request, one, model), sample=number) for number, one in enumerate(answers)]
        chosen = chooser.choose(captions, request, rater=rater)
        if active.is_cancelled:
            return []
        caption = chosen.caption
        status = [plural(len(caption.text.split()), "word"), escape(model), f"{time.monotonic() - begin:.1f} s"]
        yield {
            self.answer: render_caption(caption.text, finished=caption.finished) + render_file_notice(caption),
            self.status: " · ".join(status),
            self.reason: render_reason(chosen),
            self.copy: gr.update(visible=bool(caption.text)),
        } | self._enable()
        return [caption]

    def _stream_segments(
        self, caption_request: CaptionRequest, rule: SegmentRule, model: str, active: ActiveRequest
    ) -> Generator[Update, None, list[Caption]]:
        """Show the captions of segments as they grow; return them, without those that a stop or error left empty."""
        begin, updated = time.monotonic(), 0.0
        jobs = self.state.split_clip(caption_request, rule, model=model)
        listed = SegmentList(jobs, model)
        with closing(self.state.stream_segments(jobs, model=model)) as events:
            for event in events:
                seconds = time.monotonic() - begin
                if active.is_stopped or active.is_cancelled:
                    break
                if event is not None:
                    listed.add(*event)
                if event is None or seconds - updated > SEGMENT_UPDATE_SECONDS:
                    updated = seconds
                    progress = f"{listed.num_done} of {plural(len(jobs), 'segment')}, {seconds:.0f} s"
                    yield {
                        self.answer: render_segments(listed.segments, path=caption_request.path),
                        self.status: _busy(f"{WRITING if listed.segments else READING}, {progress}"),
                    }
        if active.is_cancelled:
            return []
        listed.stop()
        captions = listed.captions()
        joined = join_captions(captions) if captions else None
        num_words = len(joined.text.split()) if joined else 0
        status = [plural(num_words, "word"), plural(len(captions), "segment"), escape(model)]
        status += ["stopped"] * active.is_stopped + [f"{time.monotonic() - begin:.1f} s"]
        is_cut = joined is not None and not joined.finished and not active.is_stopped
        yield {
            self.answer: render_segments(listed.segments, path=caption_request.path, is_cut=is_cut)
            + (render_file_notice(joined) if joined else ""),
            self.status: " · ".join(status),
            self.copy: gr.update(visible=bool(captions)),
        } | self._enable()
        return captions

    def _complete(
        self,
        captions: Sequence[Caption],
        caption_request: CaptionRequest,
        reference: Reference | None,
        active: ActiveRequest,
        *,
        is_best: bool,
    ) -> Iterator[Update]:
        """Offer downloads, show events and score, then open the conversation."""
        path, joined = caption_request.path, join_captions(captions)
        downloads = self._render_downloads(captions, path)
        yield {self.downloads: downloads}
        update: Update = {}
        # Answers to questions are not descriptions of events.
        if captions[0].num_segments > 1:
            answer = render_segments([to_segment(one) for one in captions], path=path)
            if reference and caption_request.prompt is None:
                update[self.findings] = render_note(NOT_SCORED)
        elif active.is_stopped or caption_request.prompt is not None:
            answer = render_caption(joined.text)
        else:
            scorer = self.state.scorer
            analysis = scorer.analyze(joined, reference, modality=caption_request.modality)
            answer = render_scored_caption(analysis)
            update |= {
                self.answer: answer + render_file_notice(joined),
                self.findings: render_analysis(analysis, judge=scorer.judge.name),
            }
        if not active.is_cancelled:
            conversation = Conversation(caption_request, joined.model, joined.text, answer + downloads)
            update |= self.chat.open(conversation)
            if joined.num_segments == 1 and not active.is_stopped:
                known = self.state.reference_of(path)  # a visitor's own is only scored against
                request, best_of = caption_request, 1
                if is_best and self.state.chooser:
                    best_of = self.state.chooser.num_samples
                    request = self.state.chooser.to_samples(replace(request, seed=request.seed + joined.sample))
                shown = show_caption(self.state, joined, request, known, tab="caption", best_of=best_of)
                update |= self.rating.open(shown)
            yield update

    def _render_downloads(self, captions: Sequence[Caption], path: Path) -> str:
        """Render links to the captions as files; without subtitles if the duration of the video is unknown."""
        records = [asdict(caption) for caption in captions]
        content = records if captions[0].num_segments > 1 else records[0]
        files = {"json": json.dumps(content, ensure_ascii=False, indent=2) + "\n"}
        try:
            for name in (one for one in SUBTITLE_FORMATS if one != "json"):  # which has the whole record
                files[name] = format_text(
                    captions, name, seconds_of=lambda _: self.state.measure_seconds(path, model=captions[0].model)
                )
        except ClipError as error:
            logger.warning("no subtitles of a caption: %s", error)
        return render_downloads(files, stem=path.stem)

    def _enable(self) -> Update:
        return {self.start: gr.update(interactive=True), self.stop: gr.update(visible=False)}

    def _show_error(self, message: str) -> Update:
        return {
            self.answer: render_error(message), self.status: "", self.findings: "", self.downloads: "",
        } | self._enable() | self._close()  # fmt: skip

    def _close(self) -> Update:
        """Remove what belongs to a caption."""
        return {self.reason: ""} | self.chat.close() | self.rating.close()

    def stop_request(self, request: gr.Request) -> None:
        """Stop the session's request; the text so far is kept."""
        self.requests.stop(str(request.session_hash))

    def _no_answer(self) -> Update:
        return {
            self.answer: PLACEHOLDER, self.status: "", self.findings: "", self.downloads: "",
            self.copy: gr.update(visible=False),
        } | self._enable() | self._close()  # fmt: skip

    def count_copy(self, shown: ShownCaption | None) -> tuple[str, ShownCaption | None]:
        """Count that a whole caption was copied, once."""
        if shown is None or shown.is_copied:
            return "Copied.", shown
        count(self.state, shown.to_feedback(action="copy"))
        return "Copied.", replace(shown, is_copied=True)


def _busy(text: str) -> str:
    return f'<span class="busy">{text}</span>'
