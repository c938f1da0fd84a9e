"""The tab Dataset: a captions file as a grid to search, filter, edit and accept, with find and replace."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.batch.edits import Edit
from salmonn.batch.subtitles import SUBTITLE_FORMATS
from salmonn.records import Failure
from salmonn.score.report import format_span
from salmonn.templates import load_template
from salmonn.webui.controls import GENERATE, check_text
from salmonn.webui.dataset import FILTERS, Dataset, DatasetRow, Replacement
from salmonn.webui.feedback_panel import check_rater
from salmonn.webui.rendering import plural, render_error, render_placeholder
from salmonn.webui.session import error_message

PAGE_SIZE = 24
PREVIEWED = 20  # changes shown of a find and replace
NO_DATASET = render_placeholder(
    "No captions file", "Start the web UI with --dataset and a captions file: salmonn demo --dataset captions.jsonl"
)
NOTE = (
    "Edits are appended to the captions file: the original lines stay, and exports and later runs read the latest "
    "text. They are also saved as feedback, under this browser's random id."
)
KEEP = "Copy the videos of my edits and accepted captions to the feedback folder, so that models can be trained on them"
# JavaScript: the command of a card, and the browser's id, as the last inputs.
WITH_COMMAND = "(...inputs) => [...inputs.slice(0, -2), window.salmonn.dataset.take(), window.salmonn.rater()]"
WITH_RATER = "(...inputs) => [...inputs.slice(0, -1), window.salmonn.rater()]"
Update = dict[Any, Any]


@cache
def _macros() -> Any:
    return load_template(Path(__file__).with_name("dataset.html.jinja")).module


@dataclass(frozen=True)
class Card:
    """A row as it is rendered; `picture` and `reason` are empty until its picture has been read."""

    one: DatasetRow
    picture: str = ""
    reason: str = ""
    video: str = ""

    @property
    def is_failed(self) -> bool:
        """Whether it has no caption."""
        return isinstance(self.one.row.record, Failure)

    @property
    def folder(self) -> str:
        """The folder of the video with a slash, or ""."""
        folder, slash, _ = self.one.row.record.video.rpartition("/")
        return folder + slash

    @property
    def name(self) -> str:
        """The file name of the video."""
        return self.one.row.record.video.rpartition("/")[2]

    @property
    def text(self) -> str:
        """The caption, or the reason of the failure without the path."""
        row = self.one.row
        return row.text.removeprefix(f"{row.record.video}: ") if self.is_failed else row.text

    @property
    def details(self) -> str:
        """Span, number of words and reward."""
        words, reward = self.one.row.num_words, self.one.reward
        parts = [format_span(self.one.row.record)]
        parts += [] if self.is_failed else [f"{words} word{'' if words == 1 else 's'}"]
        parts += [] if reward is None else [f"reward {reward:.2f}"]
        return " · ".join(filter(None, parts))


class DatasetTab:
    """Lays out the tab and handles its events.

    Args:
        dataset: the captions file.
        tab: the tab itself, which loads the rows when it is selected.
    """

    def __init__(self, dataset: Dataset, tab: gr.Tab) -> None:
        self.dataset = dataset
        self.tab = tab
        shown = [name for name in FILTERS if name != "low reward" or dataset.rewards]
        self.search = gr.Textbox(
            label="Search", placeholder="words of a caption or a file name", elem_id="dataset-search"
        )
        self.show = gr.Radio(shown, value="all", label="Show", elem_id="dataset-filter", elem_classes=["pills"])
        self._add_replacement()
        with gr.Accordion("Subtitle files and training", open=False, elem_id="dataset-more", elem_classes=["fold"]):
            self.formats = gr.CheckboxGroup(list(SUBTITLE_FORMATS), value=["srt"], label="Subtitle files")
            self.export = gr.Button("Write next to the videos", elem_id="dataset-export", size="sm")
            self.exported = gr.HTML("", elem_id="dataset-exported")
            self.keep = gr.Checkbox(False, label=KEEP, elem_id="dataset-keep")
        self.status = gr.HTML("", elem_id="dataset-status")
        self.grid = gr.HTML("", elem_id="dataset-grid")
        with gr.Row(elem_classes=["dataset-pages"]):
            self.previous = gr.Button("Previous", elem_id="dataset-previous", size="sm", min_width=90)
            self.next = gr.Button("Next", elem_id="dataset-next", size="sm", min_width=90)
        gr.HTML(f'<p class="note">{NOTE}</p>')
        self.page = gr.State(0)
        self.command_button = gr.Button("Command", elem_id="dataset-command", elem_classes=["visually-hidden"])
        self.command = gr.Textbox(visible=False)  # what a person did with a card
        self.rater = gr.Textbox(visible=False)  # the browser's id
        self._connect()

    def _add_replacement(self) -> None:
        with gr.Accordion("Find and replace", open=False, elem_id="dataset-replace", elem_classes=["fold"]):
            with gr.Row():
                self.find = gr.Textbox(label="Find", elem_id="dataset-find", min_width=160)
                self.replacement = gr.Textbox(label="Replace with", elem_id="dataset-with", min_width=160)
            with gr.Row():
                self.match_case = gr.Checkbox(False, label="Match case", min_width=120)
                self.whole_words = gr.Checkbox(True, label="Whole words only", min_width=120)
            with gr.Row(elem_classes=["votes"]):
                self.preview = gr.Button("Preview", elem_id="dataset-preview", min_width=120)
                self.replace = gr.Button("Replace all", elem_id="dataset-replace-all", interactive=False, min_width=120)
            self.changes = gr.HTML("", elem_id="dataset-changes")
        self.edits = gr.State(None)  # those of the preview

    def _connect(self) -> None:
        view: set[Any] = {self.search, self.show, self.page}
        outputs = [self.grid, self.status, self.page, self.previous, self.next]
        options: dict[str, Any] = GENERATE | {"trigger_mode": "always_last"}
        changes: list[dict[str, Any]] = [
            event(self.first_page, view, outputs, **options) for event in (self.search.change, self.show.change)
        ]
        self.tab.select(self.first_page, view, outputs, **GENERATE)
        self.previous.click(self.previous_page, view, outputs, **GENERATE)
        self.next.click(self.next_page, view, outputs, **GENERATE)
        # A search that is still running would replace the message of an edit, and its rows by older ones.
        self.command_button.click(
            self.obey,
            view | {self.keep, self.command, self.rater},
            outputs,
            js=WITH_COMMAND,
            cancels=changes,
            **GENERATE,
        )
        words: set[Any] = {self.find, self.replacement, self.match_case, self.whole_words}
        replaced = [self.changes, self.replace, self.edits]
        self.preview.click(self.show_changes, words | view, replaced, **GENERATE)
        for changed in (self.find.change, self.replacement.change, self.match_case.change, self.whole_words.change):
            changed(lambda: ("", gr.update(interactive=False), None), None, replaced, **GENERATE)
        inputs: set[Any] = view | {self.edits, self.keep, self.rater}
        self.replace.click(self.replace_all, inputs, [*outputs, *replaced], js=WITH_RATER, cancels=changes, **GENERATE)
        self.export.click(self.write_subtitles, self.formats, self.exported, **GENERATE)

    def first_page(self, values: Mapping[Any, Any]) -> Iterator[Update]:
        """Show the first page of the filtered rows."""
        yield from self._show(dict(values) | {self.page: 0})

    def previous_page(self, values: Mapping[Any, Any]) -> Iterator[Update]:
        """Show the page before."""
        yield from self._show(dict(values) | {self.page: values[self.page] - 1})

    def next_page(self, values: Mapping[Any, Any]) -> Iterator[Update]:
        """Show the page after."""
        yield from self._show(dict(values) | {self.page: values[self.page] + 1})

    def obey(self, values: Mapping[Any, Any]) -> Iterator[Update]:
        """Save an edit or an accepted caption, and show the page again."""
        command: dict[str, Any] = {}
        message, saved = "", None
        try:
            command = json.loads(values[self.command] or "null") or {}
            if not isinstance(command.get("row", 0), int):
                raise TypeError("a row is not a number")
            message = self._save(command, keep=bool(values[self.keep]), rater=check_rater(values[self.rater]))
            saved = command.get("row") if command.get("act") == "save" else None
        except (ValueError, TypeError, KeyError) as error:
            message = render_error(str(error) if isinstance(error, ValueError) else "the page sent no valid command")
        except OSError as error:
            message = render_error(f"it could not be saved: {error_message(error, Path())}")
        yield from self._show(values, message=message, saved=saved)

    def _save(self, command: Mapping[str, Any], *, keep: bool, rater: str) -> str:
        act = command.get("act")
        if act == "accept":
            self.dataset.accept(int(command["row"]), str(command["before"]), rater=rater, keep_videos=keep)
            return _say("Accepted.")
        if act != "save":
            raise ValueError("the page sent no valid command")
        text = check_text(str(command["text"]), name="the caption").strip()
        if not text:
            raise ValueError("the caption is empty: write what is seen and heard")
        edit = Edit(int(command["row"]), str(command["before"]), text)
        if text == edit.before:
            return _say("The caption is unchanged.")
        _, conflicts = self.dataset.edit([edit], rater=rater, keep_videos=keep)
        if conflicts:
            raise ValueError(
                "somebody else has changed this caption since it was shown; your text is still in the box, below which "
                "Cancel shows the new caption"
            )
        return _say("Saved.")

    def show_changes(self, values: Mapping[Any, Any]) -> Update:
        """Show what a find and replace would change in the filtered rows."""
        try:
            rows = self._rows(values)
            replacement = Replacement(
                check_text(values[self.find] or "", name="the text to find"),
                check_text(values[self.replacement] or "", name="the replacement"),
                match_case=bool(values[self.match_case]),
                whole_words=bool(values[self.whole_words]),
            )
            edits, num_places = replacement.edits(rows)
        except ValueError as error:
            return {
                self.changes: render_error(str(error)),
                self.replace: gr.update(interactive=False),
                self.edits: None,
            }
        videos = {one.number: one.row.record.video for one in rows}
        sentence = (
            f"{plural(num_places, 'place')} in {plural(len(edits), 'caption')}, of {plural(len(rows), 'row')} shown"
        )
        changes = [(videos[edit.row], _difference(edit.before, edit.text)) for edit in edits[:PREVIEWED]]
        return {
            self.changes: str(_macros().preview(sentence, changes, max(len(edits) - PREVIEWED, 0))),
            self.replace: gr.update(interactive=bool(edits)),
            self.edits: edits,
        }

    def replace_all(self, values: Mapping[Any, Any]) -> Iterator[Update]:
        """Make the changes of the preview."""
        edits: Sequence[Edit] = values[self.edits] or []
        message = render_error("press Preview first") if not edits else ""
        try:
            if empty := [edit for edit in edits if not edit.text.strip()]:
                raise ValueError(f"this would leave {plural(len(empty), 'caption')} without text")
            if edits:
                keep, rater = bool(values[self.keep]), check_rater(values[self.rater])
                made, conflicts = self.dataset.edit(edits, rater=rater, keep_videos=keep)
                message = _say(
                    f"{plural(made, 'caption')} changed."
                    + (f" {plural(len(conflicts), 'caption')} skipped: changed by somebody else." if conflicts else "")
                )
        except ValueError as error:
            message = render_error(str(error))
        except OSError as error:
            message = render_error(f"it could not be saved: {error_message(error, Path())}")
        done = {self.changes: "", self.replace: gr.update(interactive=False), self.edits: None}
        for update in self._show(values, message=message):
            yield update | done

    def write_subtitles(self, formats: Sequence[str]) -> str:
        """Write subtitle files of all captions next to their videos; files written by others stay as they are."""
        names = [name for name in SUBTITLE_FORMATS if name in formats]
        if not names:
            return render_error("choose a format")
        try:
            number, failures = self.dataset.write_subtitles(names)
        except (ValueError, OSError) as error:
            return render_error(error_message(error, self.dataset.captions.files.out))
        failed = f"; {plural(len(failures), 'file')} not written: {failures[0].reason}" if failures else ""
        return _say(f"{', '.join(names)} files written for {plural(number, 'video')}{failed}.")

    def _rows(self, values: Mapping[Any, Any]) -> list[DatasetRow]:
        return self.dataset.find(
            show=values[self.show] or "all", search=check_text(values[self.search] or "", name="the search")
        )

    def _show(self, values: Mapping[Any, Any], *, message: str = "", saved: int | None = None) -> Iterator[Update]:
        """Render a page of the filtered rows, first with the pictures that are known, then with all."""
        try:
            rows = self._rows(values)
        except (ValueError, OSError) as error:
            yield {self.status: render_error(error_message(error, self.dataset.captions.files.out))}
            return
        last = max((len(rows) - 1) // PAGE_SIZE, 0)
        page = min(max(int(values[self.page]), 0), last)
        shown = rows[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        place = f"{page * PAGE_SIZE + 1}\N{EN DASH}{page * PAGE_SIZE + len(shown)} of " if shown else ""
        # The time makes each different: a page that is the same as before would not be updated.
        mark = "" if saved is None else f'<i hidden data-saved="{int(saved)}" data-time="{time.monotonic_ns()}"></i>'
        update = {
            self.status: f'{message}<p class="counts" role="status">{place}{plural(len(rows), "row")}</p>',
            self.page: page,
            self.previous: gr.update(interactive=page > 0, visible=last > 0),
            self.next: gr.update(interactive=page < last, visible=last > 0),
        }
        cards = self._cards(shown, only_known=True)
        yield update | {self.grid: mark + str(_macros().grid(cards))}
        if any(not (card.picture or card.reason) for card in cards):
            yield {self.grid: str(_macros().grid(self._cards(shown)))}

    def _cards(self, rows: Sequence[DatasetRow], *, only_known: bool = False) -> list[Card]:
        pictures = self.dataset.pictures([one.row for one in rows], only_known=only_known)
        return [
            Card(one, picture.url, picture.reason, self.dataset.video_url(one.row))
            for one, picture in zip(rows, pictures, strict=True)
        ]


def _say(message: str) -> str:
    return f'<p class="verdict">{escape(message)}</p>'


def _difference(before: str, after: str) -> list[tuple[str, str]]:
    """Return the parts of two texts that are equal or replace one another, by words."""
    words, others = before.split(" "), after.split(" ")
    parts = []
    for kind, start, end, first, last in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        old, new = " ".join(words[start:end]), " ".join(others[first:last])
        gap = "" if end == len(words) and last == len(others) else " "
        parts += [(old + gap, new + gap)] if kind == "equal" else [(old, new), (gap, gap)]
    return parts
