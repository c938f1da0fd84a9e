"""The web UI: its tabs, its theme and its launch options."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils

from salmonn.webui.caption_tab import CaptionTab
from salmonn.webui.compare_tab import CompareTab
from salmonn.webui.results_tab import add_results, add_run
from salmonn.webui.session import AppState
from salmonn.webui.uploads import BlockedTransport

HERE = Path(__file__).parent
TITLE = "salmonn"
SUBTITLE = "Captions of what is seen, heard and said in a video, and how far they can be trusted."
# System fonts, so that none are downloaded.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def build_app(state: AppState, *, run: Path | None = None, notes: Sequence[str] = ()) -> gr.Blocks:
    """Build the web UI.

    Args:
        state: the shared state.
        run: output folder of a training run to show.
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
            with gr.Tab("Results", id="results") as results:
                add_results(results, state.votes)
            with gr.Tab("Runs", id="runs") as runs:
                add_run(runs, run)

        def end_session(request: gr.Request) -> None:
            session = str(request.session_hash)
            caption_tab.requests.cancel(session)
            compare_tab.requests.cancel(session)
            state.uploads.end_session(session)

        app.unload(end_session)
    return app


def launch_options() -> dict[str, Any]:
    """Return the options of `launch` that define the looks."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", radius_size=gr.themes.sizes.radius_lg, font=SANS, font_mono=MONO
    )
    return {
        "theme": theme.set(
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
        "head": f"<style>{style}</style><script>{script}</script>",
        "footer_links": [],
        "run_history": False,  # which browsers would store
    }


def disable_remote_fetch() -> None:
    """Make Gradio, in this process, fetch no URL that a client names in place of a file (SSRF)."""
    settings: Any = processing_utils
    settings.async_transport = BlockedTransport()
