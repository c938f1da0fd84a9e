"""The tabs Results and Runs: a summary of the votes, and a training run as `salmonn plot` shows it."""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from salmonn.preference.votes import VoteStore, summarize_votes
from salmonn.train.plots import write_page
from salmonn.train.run_log import read_run
from salmonn.webui.controls import QUIET
from salmonn.webui.rendering import render_error, render_placeholder, render_results, render_run
from salmonn.webui.session import error_message

NO_RUN = render_placeholder(
    "No training run", "Start the web UI with --run and the output folder of a recipe: salmonn demo --run run"
)
NO_VOTES = render_placeholder("No votes yet", "Vote for the better of two captions under Compare; results appear here.")
_plot_lock = threading.Lock()  # matplotlib's settings are global


def load_run(run: Path) -> str:
    """Return a training run as HTML."""
    try:
        with _plot_lock, tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "run.html"
            write_page(read_run(run), page)
            return render_run(page.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return render_error(f"{error_message(error, run)}. Press Refresh once the run has written results")


def load_results(store: VoteStore) -> str:
    """Return the summary of the votes as HTML."""
    try:
        votes = store.read()
        return render_results(summarize_votes(votes, store.read_log()), folder=store.folder) if votes else NO_VOTES
    except (ValueError, OSError) as error:
        return render_error(f"the votes cannot be read: {error_message(error, store.folder)}")


def add_results(tab: gr.Tab, store: VoteStore) -> None:
    """Lay out the tab Results."""
    _add_refreshed(tab, lambda: load_results(store), name="results", initial=NO_VOTES)


def add_run(tab: gr.Tab, run: Path | None) -> None:
    """Lay out the tab Runs."""
    if run is None:
        gr.HTML(NO_RUN)
    else:
        _add_refreshed(tab, lambda: load_run(run), name="run", initial="")


def _add_refreshed(tab: gr.Tab, load: Callable[[], str], *, name: str, initial: str) -> None:
    """Add HTML that is loaded when the tab is selected, and a button to refresh it."""
    refresh = gr.Button("Refresh", size="sm", elem_id=f"refresh-{name}", elem_classes=["refresh"])
    content = gr.HTML(initial, elem_id=name)
    for event in (refresh.click, tab.select):
        event(load, None, content, **QUIET | {"show_progress": "minimal"})
