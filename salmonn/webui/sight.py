"""The video of a tab: dropped, or chosen among the examples."""

from pathlib import Path

import gradio as gr

from salmonn.webui.controls import QUIET
from salmonn.webui.session import AppState


def video_input(state: AppState, *, place: str) -> gr.Video:
    """A player that takes uploads, with the examples below it.

    Args:
        desk: what the tab works with.
        place: name of the tab: a visitor holds one file in each.
    """
    video = gr.Video(
        sources=["upload"], label="Video", elem_id=f"{place}-video", elem_classes=["sight"], height=300,
        show_label=False,
    )  # fmt: skip
    with gr.Row(elem_classes=["examples"]):
        for number, example in enumerate(state.examples, start=1):
            button = gr.Button(f"Example {number}", icon=str(example.still), size="sm", min_width=64)
            button.click(lambda path=str(example.path): path, None, video, **QUIET)

    def hold(path: str | None, request: gr.Request) -> None:
        state.uploads.hold(str(request.session_hash), place, Path(path) if path else None)

    video.change(hold, video, None, **QUIET)
    return video
