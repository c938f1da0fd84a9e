"""`salmonn push`: upload a trained model or adapter to the Hugging Face hub, with a model card."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from jsonargparse import Namespace

from salmonn.config import FlagParser
from salmonn.files import atomic_folder, read_json
from salmonn.templates import load_template

ADAPTER_CONFIG_NAME, CARD_NAME = "adapter_config.json", "README.md"
SHOWN_SETTINGS = ("rounds", "sampling.num_samples", "sampling.temperature", "loss.kind", "loss.beta", "lora.rank",
                  "lora.alpha", "fit.learning_rate", "fit.steps", "fit.batch_size", "reward.kind", "judge.kind",
                  "judge.model", "seed")  # fmt: skip


def push_parser() -> FlagParser:
    """Return the arguments of `salmonn push`."""
    parser = FlagParser(
        description="Upload a trained model or adapter to the Hugging Face hub, with a model card made from the run's "
        "results. It logs in as huggingface_hub does (hf auth login, or HF_TOKEN)."
    )
    parser.add_argument(
        "model", type=Path, help="folder of a merged model or adapter, such as run/mrdpo/round_3/merged"
    )
    parser.add_argument("repo", type=str, help="repository on the hub, such as me/my-captioner; created if needed")
    bases = "folder or hub id of the model that training started from; for adapters and --layout published"
    parser.add_argument("--base", type=str | None, default=None, help=bases)
    layouts = "own: read by salmonn and AutoModel; published: files of the base checkpoint, read by the code for it"
    parser.add_argument("--layout", type=Literal["own", "published"], default="own", help=layouts)
    runs = "folder of the run whose results the card shows (default: found from the model's folder)"
    parser.add_argument("--run", type=Path | None, default=None, help=runs)
    licenses = "license of the weights for the card, such as apache-2.0: that of the base model allows some only"
    parser.add_argument("--license", type=str | None, default=None, help=licenses)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    outs = "write the files to this new folder instead of uploading them"
    parser.add_argument("--out", type=Path | None, default=None, help=outs)
    return parser


def run_push(values: Namespace) -> int:
    """Prepare the files of a repository, and upload them or write them to a folder."""
    is_adapter = (values.model / ADAPTER_CONFIG_NAME).is_file()
    _check(values, is_adapter=is_adapter)
    if values.out:
        with atomic_folder(values.out) as folder:
            _prepare(folder, values, is_adapter=is_adapter)
        sys.stderr.write(
            f"wrote {values.out}; look at {CARD_NAME}, and upload it: hf upload {values.repo} {values.out}\n"
        )
        return 0
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    with TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, values, is_adapter=is_adapter)
        try:
            url = HfApi().create_repo(values.repo, private=values.private or None, exist_ok=True)
            HfApi().upload_folder(
                repo_id=values.repo, folder_path=folder, commit_message="Upload model trained with salmonn"
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            raise ValueError(
                f"{values.repo} cannot be written ({error}); log in with hf auth login, or set HF_TOKEN"
            ) from error
    sys.stderr.write(f"uploaded {values.model} to {url}\n")
    return 0


def _check(values: Namespace, *, is_adapter: bool) -> None:
    """Raise a ValueError for values that make no sense, before weights are read."""
    if not is_adapter and not (values.model / "config.json").is_file():
        raise ValueError(
            f"{values.model} has neither config.json nor {ADAPTER_CONFIG_NAME}; pass the folder of a saved model or "
            "adapter, such as run/mrdpo/round_3/merged"
        )
    if values.repo.count("/") != 1 or not all(values.repo.split("/")):
        raise ValueError(f"repository {values.repo!r} must be OWNER/NAME, such as me/my-captioner")
    if is_adapter and values.layout == "published":
        raise ValueError("an adapter always has the names of published ones; leave out --layout published")
    if not values.base and (is_adapter or values.layout == "published"):
        what = "an adapter belongs to a base model" if is_adapter else "--layout published has the files of the base"
        raise ValueError(f"{what}; pass its folder or hub id as --base")


def _prepare(folder: Path, values: Namespace, *, is_adapter: bool) -> None:
    """Write the files of the repository."""
    from salmonn.model.publish import write_adapter, write_own_layout, write_published_layout

    if is_adapter:
        write_adapter(values.model, folder, base=values.base)
    elif values.layout == "published":
        write_published_layout(values.model, folder, base=values.base)
    else:
        write_own_layout(values.model, folder)
    (folder / CARD_NAME).write_text(make_card(values, is_adapter=is_adapter), encoding="utf-8")


def make_card(values: Namespace, *, is_adapter: bool) -> str:
    """Return the model card: metadata, how to caption with the model, its results, and how it was trained."""
    from huggingface_hub import ModelCardData

    from salmonn.train.run_log import SUMMARY_NAME, RunSummary, format_figure, stage_name

    model = values.model.resolve()
    run = (values.run or model.parent.parent).resolve()
    if values.run and not (run / SUMMARY_NAME).is_file():
        raise ValueError(f"{run} has no {SUMMARY_NAME}; pass a finished run as --run, or leave it out")
    stages: dict[str, Any] = {}
    config = None
    if (run / SUMMARY_NAME).is_file():
        stages = dict(RunSummary.from_json(read_json(run / SUMMARY_NAME)).figures)
        config = next(iter(sorted(run.glob("*.yaml"))), None)
    columns = [
        name for name in next(iter(stages.values()), ()) if any(one[name] is not None for one in stages.values())
    ]
    data = ModelCardData(
        license=values.license,
        base_model=values.base,
        library_name="peft" if is_adapter else "salmonn",
        pipeline_tag="video-text-to-text",
        tags=["video-captioning", "audio-visual", "salmonn", *(["lora"] if is_adapter else [])],
    )
    return load_template(Path(__file__).parent / "model_card.md.jinja").render(
        metadata=data.to_yaml().strip(),
        title=values.repo.split("/")[1],
        repo=values.repo,
        flags=f"--model {values.base} --adapter {values.repo}" if is_adapter else f"--model {values.repo}",
        is_own_layout=not is_adapter and values.layout == "own",
        columns=columns,
        stages=[(stage, [format_figure(name, one[name]) for name in columns]) for stage, one in stages.items()],
        own_stage=stage_name(model.relative_to(run).parts[0]) if run in model.parents else None,  # marked in the table
        recipe=config and config.stem,
        settings=config and _read_settings(config),
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run that say most about it."""
    import yaml

    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    settings = {}
    for name in SHOWN_SETTINGS:
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            settings[name] = value
    return settings
