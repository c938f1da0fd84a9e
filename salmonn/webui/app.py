"""The page as a whole: what stands where, its colours and letters, and how it is served."""

import inspect
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from salmonn.webui.caption_tab import CaptionTab
from salmonn.webui.compare_tab import CompareTab
from salmonn.webui.results_tab import add_results, add_runs
from salmonn.webui.session import AppState

HERE = Path(__file__).parent
TITLE = "salmonn"
SENTENCE = "Captions of what is seen, heard and said in a video, and how far they can be trusted."
SANS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def build_app(state: AppState, *, run: Path | None = None, notes: Sequence[str] = ()) -> gr.Blocks:
    """Lay out the page.

    Args:
        desk: what it works with.
        run: folder of a training run to be shown.
        notes: sentences below the head, such as what the model cannot do.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(600, 6 * 3600)) as page:
        gr.HTML(_head(notes), elem_id="head", padding=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Caption", id="describe", elem_id="tab-describe"):
                describing = CaptionTab(state)
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                comparing = CompareTab(state)
            with gr.Tab("Results", id="results") as results:
                add_results(results, state.votes)
            with gr.Tab("Runs", id="runs") as runs:
                add_runs(runs, run)

        def leave(request: gr.Request) -> None:
            visitor = str(request.session_hash)
            for tab in (describing, comparing):
                tab.turns.end(visitor)
            state.uploads.leave(visitor)

        page.unload(leave)
    return page


def launch_options() -> dict[str, Any]:
    """Looks of the page, for `launch`."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    return {
        "theme": make_theme(),
        # Gradio rewrites the selectors of what it is given as css, and loses rules for narrow windows.
        "head": f"<style>{style}</style><script>{script}</script>",
        "footer_links": [],
        "run_history": False,  # which browsers would keep
    }


def make_theme() -> gr.themes.Base:
    """Colours, and letters that the system has, so that none are fetched."""
    clay = gr.themes.Color(
        "#fdf4f1", "#fae5de", "#f4cabc", "#eba68f", "#de7d60", "#c95f3f", "#b0412a", "#933422", "#742a1d", "#56211a",
        "#331310",
    )  # fmt: skip
    stone = gr.themes.Color(
        "#faf8f5", "#f3efe9", "#e4ded6", "#cfc7bc", "#aaa39a", "#8a837b", "#625c55", "#47423d", "#2b2825", "#1f1d1b",
        "#161413",
    )  # fmt: skip
    theme = gr.themes.Base(
        primary_hue=clay, secondary_hue=clay, neutral_hue=stone, font=SANS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_lg, spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
    )  # fmt: skip
    # The names are Gradio's, the values those of app.css, where both schemes stand.
    looks = {
        "body_background_fill": "var(--paper)",
        "block_background_fill": "var(--card)",
        "block_border_color": "var(--line)",
        "border_color_primary": "var(--line)",
        "input_background_fill": "var(--card)",
        "input_border_color": "var(--line)",
        "input_border_width": "1px",
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--soft)",
        "block_label_text_color": "var(--soft)",
        "block_title_text_color": "var(--soft)",
        "block_info_text_color": "var(--soft)",
        "color_accent": "var(--accent)",
        "button_primary_background_fill": "var(--accent)",
        "button_primary_background_fill_hover": "color-mix(in srgb, var(--accent) 85%, var(--ink))",
        "button_primary_text_color": "var(--card)",
        "button_secondary_background_fill": "var(--card)",
        "button_secondary_background_fill_hover": "var(--wash)",
        "button_secondary_border_color": "var(--line)",
        "button_secondary_text_color": "var(--ink)",
        "checkbox_label_background_fill": "var(--card)",
        "checkbox_label_background_fill_hover": "var(--wash)",
        "checkbox_label_background_fill_selected": "var(--wash)",
        "checkbox_label_border_color": "var(--line)",
        "checkbox_label_text_color": "var(--ink)",
        "checkbox_background_color_selected": "var(--accent)",
        "checkbox_border_color_selected": "var(--accent)",
        "slider_color": "var(--accent)",
    }
    known = inspect.signature(theme.set).parameters
    return theme.set(**looks, **{f"{name}_dark": value for name, value in looks.items() if f"{name}_dark" in known})


def _head(notes: Sequence[str]) -> str:
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"<header><h1>{TITLE}</h1><p>{SENTENCE}</p>{told}</header>"
