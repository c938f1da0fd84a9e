"""The tabs Runs and Results: a training run as `salmonn plot` shows it, and what the votes say."""

import tempfile
import threading
from pathlib import Path

import gradio as gr

from salmonn.preference.vote_results import summarize_votes
from salmonn.preference.votes import VoteStore
from salmonn.train.plots import write_page
from salmonn.train.run_log import read_run
from salmonn.webui.controls import QUIET
from salmonn.webui.rendering import show_empty, show_results, show_run, show_trouble
from salmonn.webui.session import tell

NO_RUN = show_empty(
    "No training run", "Start the page with --run and the folder that a recipe writes to: salmonn demo --run run"
)
NO_VOTES = show_empty(
    "No votes yet", "Choose the better of two captions under Compare: what the votes say stands here."
)
_drawing = threading.Lock()  # matplotlib's settings are the process's


def draw_run(run: Path | None) -> str:
    """A run's page, or why there is none."""
    if run is None:
        return NO_RUN
    try:
        with _drawing, tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "run.html"
            write_page(read_run(run), page)
            return show_run(page.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return show_trouble(f"{tell(error, run)}. Press Refresh when it has written something")


def draw_results(store: VoteStore) -> str:
    """What the votes say, or where to vote."""
    try:
        votes = store.read()
        return show_results(summarize_votes(votes, store.read_log()), folder=store.folder) if votes else NO_VOTES
    except (ValueError, OSError) as error:
        return show_trouble(f"the votes cannot be read: {tell(error, store.folder)}")


def add_runs(tab: gr.Tab, run: Path | None) -> None:
    """Lay out the tab of the run."""
    if run is None:
        gr.HTML(NO_RUN)
    else:
        refresh = gr.Button("Refresh", size="sm", elem_id="refresh-run", elem_classes=["refresh"])
        frame = gr.HTML("", elem_id="run")
        refresh.click(lambda: draw_run(run), None, frame, **LOOK)
        tab.select(lambda: draw_run(run), None, frame, **LOOK)


def add_results(tab: gr.Tab, store: VoteStore) -> None:
    """Lay out the tab of the votes."""
    refresh = gr.Button("Refresh", size="sm", elem_id="refresh-results", elem_classes=["refresh"])
    frame = gr.HTML(NO_VOTES, elem_id="results")
    refresh.click(lambda: draw_results(store), None, frame, **LOOK)
    tab.select(lambda: draw_results(store), None, frame, **LOOK)


LOOK = QUIET | {"show_progress": "minimal"}
