"""`salmonn demo`: serve the web UI to caption, compare and vote, and inspect training runs."""

import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from salmonn.cli.options import add_model_options, add_server_options, is_loopback, load_captioner
from salmonn.config import FlagParser
from salmonn.score.config import JudgeConfig

if TYPE_CHECKING:
    from salmonn.batch.edits import EditableCaptions
    from salmonn.caption.engine import Engine
    from salmonn.caption.loader import ClipReader
    from salmonn.preference.mixture import RaterGroup
    from salmonn.webui.chooser import CaptionChooser
    from salmonn.webui.dataset import Dataset
    from salmonn.webui.scorer import CaptionScorer
    from salmonn.webui.session import AppState

TOY_NOTE = "This is the built-in toy model: it only knows coloured shapes and tones."
MAX_LARGE_UPLOADS = 4  # uploads of the maximum size that all sessions together may store
CLEANUP_SECONDS = 60.0
FEATURE_CACHE_BYTES = 512 << 20  # of each model, for further questions about a clip


def demo_parser() -> FlagParser:
    """Return the arguments of `salmonn demo`."""
    parser = FlagParser(
        description="Serve a web UI: caption a video, score and rate the caption, compare two captions blind and vote, "
        "describe a clip with a draft, review a captions file, inspect a training run. It works offline. Uploads are "
        "deleted after use."
    )
    parser.add_argument("--other_model", type=str | None, default=None, help="second model, to compare with --model")
    parser.add_argument("--run", type=Path | None, default=None, help="folder of a training run to show")
    parser.add_argument(
        "--reward_model",
        type=Path | None,
        default=None,
        help="folder of a reward model that was trained on one of these models, to show the best of several captions; "
        "with an ideal-point one, the best for the visitor, and the groups of raters",
    )
    parser.add_argument(
        "--references", type=Path | None, default=None, help="references, matched to uploads by file name"
    )
    group = parser.add_argument_group("Review of captions")
    group.add_argument(
        "--dataset",
        type=Path | None,
        default=None,
        help="captions file to look through and edit; visitors can change it",
    )
    group.add_argument("--dataset_root", type=Path, default=Path(), help="folder that its videos' paths start from")
    group.add_argument("--rewards", type=Path | None, default=None, help="rewards of its captions, by `salmonn reward`")
    parser.add_argument("--votes", type=Path, default=Path("run/votes"), help="folder for people's feedback")
    add_server_options(parser, port=7860, read_seconds=120.0)
    group = parser.add_argument_group("Access and limits")
    group.add_argument("--password_file", type=Path | None, default=None, help="file with lines of user:password")
    group.add_argument("--no_auth", action="store_true", help="require no password, even from other machines")
    group.add_argument("--max_seconds", type=float, default=600.0, help="maximum duration of a clip")
    group.add_argument("--max_upload_mib", type=int, default=512, help="maximum upload size")
    group.add_argument(
        "--max_waiting", type=int, default=32, help="maximum number of answers queued or being generated"
    )
    add_model_options(parser)
    parser.add_class_arguments(JudgeConfig, "judge")
    return parser


def run_demo(values: Namespace) -> int:
    """Serve the web UI until a signal stops it."""
    accounts = _read_accounts(values)
    if values.workers < 1 or min(values.max_seconds, values.max_upload_mib, values.max_waiting) <= 0:
        raise ValueError("--workers must be at least 1, and --max-seconds, --max-upload-mib and --max-waiting above 0")
    if importlib.util.find_spec("gradio") is None:  # checked before any model is loaded
        raise ValueError("salmonn demo needs Gradio: pip install 'salmonn[demo]'")
    models = _name_models(values)
    groups = _read_groups(values.reward_model) if values.reward_model else []
    scorer = _open_scorer(values)
    captions, rewards = _open_captions(values)
    from salmonn.caption.loader import ClipReader
    from salmonn.caption.worker import WorkerLimits
    from salmonn.preference.feedback import FeedbackStore
    from salmonn.serve.sources import upload_folder
    from salmonn.webui.session import AppState, make_example_clips
    from salmonn.webui.uploads import UploadStore

    feedback, limits = FeedbackStore(values.votes), WorkerLimits(values.read_seconds, values.read_gib)
    with upload_folder() as folder, ClipReader(workers=values.workers, limits=limits) as reader:
        state = AppState(
            engines={name: _open_engine(model, reader, values) for name, model in models.items()},
            scorer=scorer,
            feedback=feedback,
            examples=make_example_clips(folder / "examples"),
            uploads=UploadStore(folder / "uploads", max_bytes=MAX_LARGE_UPLOADS * (values.max_upload_mib << 20)),
        )
        dataset = None
        if captions:
            from salmonn.webui.dataset import Dataset

            dataset = Dataset(captions, feedback, reader, values.dataset_root, rewards)
        try:
            if values.reward_model:
                state = replace(state, chooser=_open_chooser(values.reward_model, state))
            _serve(values, state, accounts, groups, dataset)
        finally:
            state.close()
    return 0


def _open_chooser(folder: Path, state: "AppState") -> "CaptionChooser":
    """Load a reward model, whose base is a model of the web UI; raises ValueError if none is."""
    from salmonn.model.fingerprint import hash_model
    from salmonn.preference.reward_model import RewardModel, read_info
    from salmonn.webui.chooser import CaptionChooser

    info = read_info(folder)
    for engine in state.engines.values():
        if hash_model(engine.captioner.network) == info.base_fingerprint:
            return CaptionChooser(RewardModel.load(folder, captioner=engine.captioner), engine, state.feedback)
    raise ValueError(
        f"{folder} was trained on {info.base}, whose weights none of the models here has: name that model with --model "
        "or --other-model, or train the reward model again"
    )


def _read_groups(folder: Path) -> list["RaterGroup"]:
    """Return the groups of raters of a reward model, none if its reward is the same for all.

    Raises:
        ValueError: the folder holds no reward model, or one with an adapter.
    """
    from salmonn.files import read_records
    from salmonn.preference.mixture import RATERS_NAME, Rater, group_raters
    from salmonn.preference.reward_model import ADAPTER_DIR, read_info

    prototypes = read_info(folder).prototypes
    if (folder / ADAPTER_DIR).exists():
        raise ValueError(
            f"{folder} has an adapter, which would change the captions of its base: train one without --lora.rank"
        )
    return group_raters(prototypes, read_records(folder / RATERS_NAME, Rater)) if prototypes else []


def _open_captions(values: Namespace) -> tuple["EditableCaptions | None", dict[tuple[str, int], float]]:
    """Return the captions to review, if there are any, and their rewards by video and sample."""
    from salmonn.batch.edits import EditableCaptions
    from salmonn.files import read_records
    from salmonn.preference.rating import Rating, rewards_by_sample

    if values.rewards and not values.dataset:
        raise ValueError("--rewards are those of the captions of --dataset; give both")
    rewards = rewards_by_sample(read_records(values.rewards, Rating)) if values.rewards else {}
    return (EditableCaptions(values.dataset) if values.dataset else None), rewards


def _serve(
    values: Namespace,
    state: "AppState",
    accounts: list[tuple[str, str]],
    groups: Sequence["RaterGroup"],
    dataset: "Dataset | None",
) -> None:
    # Gradio reads its upload folder only from here. It is deleted together with this process.
    os.environ["GRADIO_TEMP_DIR"] = str(state.uploads.root)
    import gradio as gr
    from starlette.middleware import Middleware

    from salmonn.webui.app import build_app, disable_remote_fetch, launch_options, set_link_preview
    from salmonn.webui.dataset import DatasetVideos
    from salmonn.webui.uploads import UploadLimitMiddleware

    disable_remote_fetch()
    set_link_preview()
    max_bytes = values.max_upload_mib << 20
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    gr.set_static_paths([state.examples[0].path.parent])
    page = build_app(state, run=values.run, groups=groups, dataset=dataset, notes=[] if values.model else [TOY_NOTE])
    middleware = [Middleware(UploadLimitMiddleware, uploads=state.uploads, max_upload_bytes=max_bytes)]
    middleware += [Middleware(DatasetVideos, dataset=dataset)] if dataset else []
    page.queue(max_size=4 * values.max_waiting, default_concurrency_limit=None)
    _, address, _ = page.launch(
        server_name=values.host,
        server_port=values.port or _free_port(values.host),
        auth=accounts or None,
        max_file_size=max_bytes,
        app_kwargs={"middleware": middleware},
        max_threads=2 * values.max_waiting,
        prevent_thread_lock=True,
        quiet=True,
        **launch_options(),
    )
    sys.stderr.write(f"web UI running at {address} (press Ctrl-C to stop)\n")
    sys.stderr.flush()
    while not ended.wait(CLEANUP_SECONDS):
        state.uploads.delete_unused()
    page.close(verbose=False)


def _free_port(host: str) -> int:
    """Let the system choose a free port: Gradio would only try a hundred, starting at 7860."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as free:
        return int(free.getsockname()[1])


def _name_models(values: Namespace) -> dict[str, str | None]:
    """Map display names to folders or Hub ids; None is the toy model.

    Raises:
        ValueError: both models are the same.
    """
    models = [values.model, *([values.other_model] if values.other_model else [])]
    if len(set(models)) < len(models):
        raise ValueError("--other-model is the same as --model; leave it out to compare two samples of one model")
    names = ["toy" if model is None else Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [str(model) for model in models]
    return dict(zip(names, models, strict=True))


def _open_engine(model: str | None, reader: "ClipReader", values: Namespace) -> "Engine":
    from salmonn.caption.engine import Engine

    flags = values.clone()
    # The adapter belongs to --model.
    flags.model, flags.adapter = model, values.adapter if model == values.model else None
    return Engine(
        load_captioner(flags),
        reader,
        max_waiting=values.max_waiting,
        max_seconds=values.max_seconds,
        feature_cache_bytes=FEATURE_CACHE_BYTES,
    )


def _open_scorer(values: Namespace) -> "CaptionScorer":
    from salmonn.preference.reward import make_judge, make_llm_client
    from salmonn.score.formats import read_references
    from salmonn.webui.scorer import CaptionScorer, references_by_file_name

    config = JudgeConfig(**vars(values.judge))
    references = read_references(values.references).values() if values.references else []
    return CaptionScorer(
        make_judge(config),
        client=make_llm_client(config) if config.kind == "openai" else None,
        attempts=config.attempts,
        references=references_by_file_name(references),
    )


def _read_accounts(values: Namespace) -> list[tuple[str, str]]:
    """Read the user names and passwords.

    Raises:
        ValueError: a line is not user:password, or other machines could reach a web UI without a password.
    """
    if values.password_file is None:
        if not values.no_auth and not is_loopback(values.host):
            raise ValueError(
                f"other machines can reach the web UI at {values.host}; require passwords with --password-file, or "
                "allow everyone with --no-auth"
            )
        return []
    accounts = []
    for number, line in enumerate(values.password_file.read_text(encoding="utf-8").splitlines(), start=1):
        user, _, password = line.strip().partition(":")
        if line.strip() and not (user and password):
            raise ValueError(f"{values.password_file}, line {number}: expected user:password")
        if line.strip():
            accounts.append((user, password))
    if not accounts:
        raise ValueError(f"{values.password_file} has no accounts; add lines of user:password")
    return accounts
