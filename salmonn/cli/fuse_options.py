"""Flags of `salmonn caption` for one caption of a whole video from those of its segments, and their run."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.cli.options import plural
from salmonn.config import FlagParser
from salmonn.score.config import JudgeConfig, JudgeKind

if TYPE_CHECKING:
    from salmonn.batch.fetch import FetchConfig
    from salmonn.batch.job import JobConfig
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.caption.fusion import CaptionerWriter, FactCheck, Writer
    from salmonn.caption.generator import BatchCaptioner
    from salmonn.caption.worker import WorkerLimits

FuseKind = Literal["rule", "model", "text-model"]
FUSE_KEY_FLAG = "--fuse-api-key-env"
_FLAGS = ("fuse_server", "fuse_model", "fuse_judge", "fuse_api_key_env")


def add_fuse_options(parser: FlagParser) -> None:
    """Add the flags to a parser."""
    group = parser.add_argument_group(
        "One caption of a whole video",
        "With --segments, captions.fused.jsonl gets one caption of each video, with every fact of its segments.",
    )
    kinds = (
        "who writes it: rule puts the captions of the segments one after the other with their times (offline); model "
        "is the captioning model; text-model is a language model on a server (--fuse alone: rule)"
    )
    group.add_argument("--fuse", nargs="?", const="rule", type=FuseKind | None, default=None, help=kinds)
    server = "OpenAI-compatible server of the text model, such as http://localhost:8000/v1 (default: OpenAI's)"
    group.add_argument("--fuse_server", type=str | None, default=None, help=server)
    group.add_argument("--fuse_model", type=str | None, default=None, help="name of the text model on its server")
    key = "name of the environment variable with that server's API key (default: see --server-api-key-env)"
    group.add_argument("--fuse_api_key_env", type=str | None, default=None, help=key)
    limit = "token limit of a text by --fuse model (default: --max-new-tokens or the model's own limit, the higher one)"
    group.add_argument("--fuse_max_new_tokens", type=int | None, default=None, help=limit)
    judges = (
        "count facts that are lost, changed or added, and ask a model once more for a text with such: "
        f"{', '.join(get_args(JudgeKind))} (the text model; rule only knows synthetic clips)"
    )
    group.add_argument("--fuse_judge", type=JudgeKind | None, default=None, help=judges)


def check_fuse_options(values: Namespace) -> None:
    """Raise a ValueError for flags that do not belong together."""
    _check_token_limit(values)
    given = [f"--{name.replace('_', '-')}" for name in _FLAGS if values[name] is not None]
    if values.fuse is None:
        if given:
            raise ValueError(f"{given[0]} needs --fuse")
        return
    if values.segments is None:
        raise ValueError("--fuse makes one caption from those of segments; add --segments shots, or --segments 10")
    if values.shape is not None and values.shape.is_named:
        raise ValueError("--fuse makes one caption of each video, and --prompts several; use --prompt, or no --fuse")
    if str(values.out) == "-":
        raise ValueError("--fuse needs a file; use --out captions.jsonl instead of --out -")
    if values.fuse == "model" and values.engine == "ray":
        raise ValueError("--fuse model runs in one process; use --fuse text-model or rule with --engine ray")
    needs_model = values.fuse == "text-model" or values.fuse_judge == "openai"
    if needs_model and not values.fuse_model:
        raise ValueError("the text model needs its name on the server: add --fuse-model")
    if not needs_model and (values.fuse_model or values.fuse_server or values.fuse_api_key_env):
        raise ValueError(f"{given[0]} is for --fuse text-model and --fuse-judge openai; add one of them or remove it")
    if needs_model:
        fuse_server_config(values)


def _check_token_limit(values: Namespace) -> None:
    if (limit := values.fuse_max_new_tokens) is None:
        return
    if values.fuse != "model":
        raise ValueError("--fuse-max-new-tokens is for --fuse model; add that, or remove it")
    if limit < 1:
        raise ValueError(f"--fuse-max-new-tokens must be at least 1, got {limit}")


def run_fusion(
    values: Namespace,
    files: "LedgerFiles",
    *,
    config: "JobConfig",
    limits: "WorkerLimits",
    fetch: "FetchConfig",
    load: "Callable[[], BatchCaptioner]",
) -> int:
    """Write the fused captions; return the number of videos that failed.

    Args:
        values: flags of the command.
        files: files of the run.
        config: how videos are captioned; the captioning model fuses in the same way.
        limits, fetch: limits for reading and fetching videos, for the captioning model.
        load: returns the captioning model of the run.

    Raises:
        LLMStoppedError: a server takes no further request.
    """
    from salmonn.batch.export import LatestCaptions
    from salmonn.batch.fetch import Fetcher
    from salmonn.batch.fused import fuse_captions
    from salmonn.caption.shape import ONLY_CAPTION
    from salmonn.caption.text_model import load_text_model, text_model_config

    latest = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions())
    out = files.fused
    with ExitStack() as stack:
        fetcher = stack.enter_context(Fetcher(fetch)) if values.fuse == "model" else None

        def load_all() -> "tuple[Writer | None, FactCheck | None]":
            writer: Writer | None = None
            if values.fuse == "model":
                writer = _captioner_writer(values, load(), config, limits, stack)
            elif values.fuse == "text-model":
                server = text_model_config(
                    url=values.fuse_server, model=values.fuse_model, api_key_env=values.fuse_api_key_env
                )
                writer = load_text_model(server, budget=values.budget, key_flag=FUSE_KEY_FLAG)
            return writer, _fact_check(values)

        stats = fuse_captions(
            latest,
            out,
            settings=repr([values.fuse, values.server_model or values.model, values.fuse_model, values.fuse_judge]),
            load=load_all,
            on_failure=lambda reason: tqdm.write(f"failed: {reason}", file=sys.stderr),
            fetcher=fetcher,
            shape=None if values.shape is None else values.shape.captions.get(ONLY_CAPTION),
        )
    if not values.quiet:
        before = f", {stats.fused_before} there already" if stats.fused_before else ""
        sys.stderr.write(f"{plural(stats.fused, 'video')} fused in {out}{before}, {stats.failed} failed\n")
        if values.fuse_judge:
            sys.stderr.write(
                f"of {plural(stats.facts, 'fact')}, {stats.lost} lost, {stats.changed} changed; {stats.added} added\n"
            )
    return stats.failed


def _captioner_writer(
    values: Namespace, captioner: "BatchCaptioner", config: "JobConfig", limits: "WorkerLimits", stack: ExitStack
) -> "CaptionerWriter":
    from salmonn.caption.fusion import CaptionerWriter
    from salmonn.caption.generator import Sampling
    from salmonn.caption.loader import ClipReader

    limit = max(config.max_new_tokens or 0, captioner.default_sampling().max_new_tokens)
    sampling = replace(
        config.request.sampling or Sampling(), max_new_tokens=values.fuse_max_new_tokens or limit, logprobs=None
    )
    reader = ClipReader(workers=1 if values.workers is None else values.workers, limits=limits)
    return CaptionerWriter(
        captioner,
        template=replace(config.request, sampling=sampling),
        reader=stack.enter_context(reader),
        batch_size=config.batch_size,
    )


def fuse_server_config(values: Namespace) -> JudgeConfig:
    """Return the server of the text model and the judge; raises a ValueError for an address that cannot be used."""
    return JudgeConfig(
        model=values.fuse_model, base_url=values.fuse_server, api_key_env=values.fuse_api_key_env, kind="openai"
    )


def _fact_check(values: Namespace) -> "FactCheck | None":
    from salmonn.caption.fusion import FactCheck
    from salmonn.preference.reward import make_judge, make_llm_client
    from salmonn.score.events import list_events
    from salmonn.synthetic.parser import split_caption

    if values.fuse_judge is None:
        return None
    config, client = JudgeConfig(), None
    if values.fuse_judge == "openai":
        config = fuse_server_config(values)
        client = make_llm_client(config, budget=values.budget, key_flag=FUSE_KEY_FLAG)
    return FactCheck(
        make_judge(config, client=client),
        lambda references: list_events(references, client=client, rules=split_caption, attempts=config.attempts)[0],
        name=config.model or config.kind,
    )
