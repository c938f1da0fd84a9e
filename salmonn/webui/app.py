"""The web UI: its tabs (Results and Runs are built here), its theme and its launch options."""

import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.routes
import jinja2
from gradio import processing_utils

from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.feedback_report import summarize_feedback
from salmonn.preference.mixture import RaterGroup
from salmonn.train.plots import write_page
from salmonn.train.run_log import read_run
from salmonn.webui.caption_tab import HISTORY, CaptionTab
from salmonn.webui.compare_tab import CompareTab
from salmonn.webui.controls import QUIET
from salmonn.webui.dataset import Dataset
from salmonn.webui.dataset_tab import NO_DATASET, DatasetTab
from salmonn.webui.rendering import render_error, render_placeholder, render_results, render_run
from salmonn.webui.session import AppState, error_message
from salmonn.webui.uploads import BlockedTransport
from salmonn.webui.write_tab import WriteTab

HERE = Path(__file__).parent
TITLE = "salmonn"
SUBTITLE = "Captions of what is seen, heard and said in a video, and how far they can be trusted."
# System fonts, so that none are downloaded.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
NO_RUN = render_placeholder(
    "No training run", "Start the web UI with --run and the output folder of a recipe: salmonn demo --run run"
)
NO_VOTES = render_placeholder("No votes yet", "Vote for the better of two captions under Compare; results appear here.")
_plot_lock = threading.Lock()  # matplotlib's settings are global


def build_app(
    state: AppState,
    *,
    run: Path | None = None,
    groups: Sequence[RaterGroup] = (),
    dataset: Dataset | None = None,
    notes: Sequence[str] = (),
) -> gr.Blocks:
    """Build the web UI.

    Args:
        state: the shared state.
        run: output folder of a training run to show.
        groups: groups of raters to show with the results.
        dataset: a captions file to review.
        notes: sentences below the title, for example on the limits of a model.
    """
    # The store of uploads deletes files once they are unused; this deletes those of sessions without an unload event.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(600, 6 * 3600)) as app:
        paragraphs = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        gr.HTML(f"<header><h1>{TITLE}</h1><p>{SUBTITLE}</p>{paragraphs}</header>", elem_id="head", padding=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Caption", id="caption", elem_id="tab-caption"):
                caption_tab = CaptionTab(state)
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                compare_tab = CompareTab(state)
            with gr.Tab("Write", id="write", elem_id="tab-write"):
                write_tab = WriteTab(state)
            with gr.Tab("Dataset", id="dataset", elem_id="tab-dataset") as dataset_tab:
                if dataset is None:
                    gr.HTML(NO_DATASET)
                else:
                    DatasetTab(dataset, dataset_tab)
            with gr.Tab("Results", id="results") as results:
                load = partial(load_results, state.feedback, groups=groups)
                _add_refreshed(results, load, name="results", initial=NO_VOTES)
            with gr.Tab("Runs", id="runs") as runs:
                if run is None:
                    gr.HTML(NO_RUN)
                else:
                    _add_refreshed(runs, partial(load_run, run), name="run", initial="")

        def end_session(request: gr.Request) -> None:
            session = str(request.session_hash)
            caption_tab.requests.cancel(session)
            compare_tab.requests.cancel(session)
            write_tab.requests.cancel(session)
            state.uploads.end_session(session)

        app.load(None, None, caption_tab.history, js=HISTORY, **QUIET)
        app.unload(end_session)
    return app


def load_run(run: Path) -> str:
    """Return a training run, as `salmonn plot` shows it, as HTML."""
    try:
        with _plot_lock, tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "run.html"
            write_page(read_run(run), page)
            return render_run(page.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return render_error(
            f"the run cannot be shown: {error_message(error, run)}. Press Refresh once the run has written results"
        )


def load_results(store: FeedbackStore, *, groups: Sequence[RaterGroup] = ()) -> str:
    """Return the summary of the feedback as HTML."""
    try:
        feedback = store.read()
        if not feedback:
            return NO_VOTES
        return render_results(summarize_feedback(feedback), folder=store.folder, groups=groups)
    except (ValueError, OSError) as error:
        return render_error(f"the feedback cannot be read: {error_message(error, store.folder)}")


def _add_refreshed(tab: gr.Tab, load: Callable[[], str], *, name: str, initial: str) -> None:
    """Add HTML that is loaded when the tab is selected, and a button to refresh it."""
    refresh = gr.Button("Refresh", size="sm", elem_id=f"refresh-{name}", elem_classes=["refresh"])
    content = gr.HTML(initial, elem_id=name)
    for event in (refresh.click, tab.select):
        event(load, None, content, **QUIET | {"show_progress": "minimal"})


def launch_options() -> dict[str, Any]:
    """Return the options of `launch` that define the looks."""
    style, *scripts = (
        (HERE / name).read_text(encoding="utf-8")
        for name in ("app.css", "app.js", "recorder.js", "history.js", "dataset.js")
    )
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", radius_size=gr.themes.sizes.radius_lg, font=SANS, font_mono=MONO
    )
    return {
        "theme": theme.set(
            # The login page, which app.css does not reach, has the background of body and panels in turn.
            background_fill_primary="*neutral_50",
            body_background_fill="*neutral_50",
            body_background_fill_dark="*neutral_950",
            body_text_color_subdued="*neutral_500",
            block_background_fill="white",
            block_background_fill_dark="*neutral_900",
            color_accent="*primary_700",
            slider_color="*primary_700",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_text_color="white",
        ),
        # Gradio rewrites the selectors of its css option, and loses rules for narrow windows.
        "head": f"<style>{style}</style>" + "".join(f"<script>{script}</script>" for script in scripts),
        "favicon_path": str(HERE / "favicon.svg"),
        "footer_links": [],
        "run_history": False,  # which browsers would store
    }


def set_link_preview() -> None:
    """Make the HTML of Gradio, in this process, name salmonn in previews of a link, and load no picture."""
    name = "frontend/index.html"
    environment = gradio.routes.templates.env
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, name)
    source = re.sub(r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>', "", source)
    tags = {"og:type": "website", "og:title": TITLE, "og:description": SUBTITLE, "description": SUBTITLE}
    preview = "".join(f'<meta property="{key}" name="{key}" content="{escape(text)}" />' for key, text in tags.items())
    changed = jinja2.DictLoader({name: source.replace("<head>", f"<head>{preview}", 1)})
    environment.loader = jinja2.ChoiceLoader([changed, environment.loader])


def disable_remote_fetch() -> None:
    """Make Gradio, in this process, fetch no URL that a client names instead of a file (SSRF)."""
    settings: Any = processing_utils
    settings.async_transport = BlockedTransport()
