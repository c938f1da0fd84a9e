"""Shipped YAML files match their recipes; errors have a message and exit code 2; run folders keep their config."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from salmonn.config import MAY_CHANGE, MAY_CHANGE_BUT_NOT_TO_NONE, parse_config, resume_values, run_recipe, write_config
from salmonn.model.lora import LoraConfig
from salmonn.preference.selection import SelectionConfig
from salmonn.train.sampling import SampleConfig

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_OF = {
    "mrdpo.yaml": "mrdpo",
    "mrdpo_plain.yaml": "mrdpo",
    "ablation.yaml": "mrdpo",
    "mrdpo": "mrdpo",
    "dpo.yaml": "dpo",
    "dpo": "dpo",
    "reward.yaml": "reward",
}  # every other YAML is a stage of sft
CONFIG_OF = {"mrdpo": "MrDpoConfig", "sft": "SftConfig", "dpo": "OfflineDpoConfig", "reward": "RewardRecipeConfig"}
YAMLS = sorted((RECIPES / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(RECIPES / "configs")) for path in YAMLS]
# Each family and each recipe once; the dry runs of the other published models are slow tests.
FAST_DRY_RUNS = {
    "salmonn2/reward.yaml",
    "salmonn2_plus/mrdpo.yaml",
    "d_orca/dpo.yaml",
    "qwen2_5_omni/dpo.yaml",
    "qwen3_omni/dpo.yaml",
    "qwen3_vl/sft.yaml",
}


def dry_run_params() -> list[object]:
    """Return the YAML files; those of published models whose dry run is no fast test are marked as slow."""
    is_fast = [name.partition("published/")[2] in {"", *FAST_DRY_RUNS} for name in NAMES]
    assert len(YAMLS) > sum(is_fast) > len(FAST_DRY_RUNS)
    return [
        path if fast else pytest.param(path, marks=pytest.mark.slow) for path, fast in zip(YAMLS, is_fast, strict=True)
    ]


@pytest.fixture
def config_type(load_recipe):
    """Return the config dataclass of a YAML file or recipe."""

    def find(name: str) -> type:
        recipe = RECIPE_OF.get(name, "sft")
        return getattr(load_recipe(recipe), CONFIG_OF[recipe])

    return find


@dataclass(frozen=True)
class Inner:
    """Nested.

    Args:
        rate: a number.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be 0 or above, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    """A recipe's config.

    Args:
        out: a folder.
        names: some names.
        inner: nested.
        maybe: nested, or nothing.
        steps: a whole number.
        bare: a switch.
    """

    out: Path = Path("run")
    names: tuple[str, ...] = ("a", "b")
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    steps: int = 3
    bare: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def parse(*args: str, of: type = Outer):
    return parse_config(of, description="A recipe.", args=args)


def flat(value, prefix=""):
    """Flatten nested keys to dotted ones."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name, inner in value.items() for key, item in flat(inner, f"{prefix}.{name}").items()}


def at(config, key: str):
    """Return the value of a dotted key; None if a part of it is None."""
    for name in key.strip(".").split("."):
        config = config.get(name) if isinstance(config, dict) else None if config is None else getattr(config, name)
    return config


@pytest.mark.parametrize("path", YAMLS, ids=NAMES)
def test_shipped_yaml_matches_its_recipe(config_type, path):
    config = parse("--config", str(path), of=config_type(path.name))
    for key, value in flat(yaml.safe_load(path.read_text())).items():
        value_read = at(config, key)
        value_read = list(value_read) if isinstance(value_read, tuple) else value_read
        assert (str(value_read) if isinstance(value_read, Path) else value_read) == value


@pytest.mark.parametrize("path", YAMLS, ids=NAMES)
def test_shipped_yaml_repeats_no_defaults(config_type, path):
    of = config_type(path.name)
    required = {f.name for f in dataclasses.fields(of) if f.default is f.default_factory is dataclasses.MISSING}
    default = of(**{name: Path() for name in required}, dry_run=True)  # which needs no preferences
    config = parse("--config", str(path), of=of)
    keys = [key for key in flat(yaml.safe_load(path.read_text())) if key.strip(".") not in required]
    same = [key.strip(".") for key in keys if at(config, key) == at(default, key)]
    assert not same, f"{path.name} repeats defaults: {', '.join(same)}"


@pytest.mark.parametrize("path", dry_run_params(), ids=NAMES)
def test_shipped_yaml_runs_dry(load_recipe, config_type, random_model, path, tmp_path, monkeypatch, capsys):
    """A dry run prints its requirements, loads no weights and writes no files."""
    of = config_type(path.name)
    recipe = load_recipe(RECIPE_OF.get(path.name, "sft"))
    # The toy stages start from the models of earlier stages, which do not exist here.
    toy = ["--model", str(random_model)] if path.parent.name == "configs" and path.stem != "pretrain_1_objects" else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("salmonn.caption.captioner.Captioner.load", None)
    run_recipe(recipe.main, of, description="A recipe.", args=["--config", str(path), "--dry-run", *toy])
    out = capsys.readouterr().out
    assert all(text in out for text in ("language model", "A clip of 51 s", "peak", "fits 80 GiB"))
    stages = {
        "mrdpo": ["guided DPO of", "rebirth of"],
        "mrdpo_plain": ["guided DPO of", "rebirth of"],
        "ablation": ["guided DPO of", "rebirth of"],
        "dpo": ["guided DPO of"],
        "reward": ["reward model of"],
    }.get(path.stem, ["SFT of"])
    assert [stage for stage in ("SFT of", "guided DPO of", "rebirth of", "reward model of") if stage in out] == stages
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_missing_model(load_recipe, config_type, capsys):
    args = ["--config", str(RECIPES / "configs" / "align_audio.yaml"), "--dry_run", "--model", "no/such"]
    with pytest.raises(SystemExit) as caught:
        run_recipe(load_recipe("sft").main, config_type("sft"), description="A recipe.", args=args)
    assert caught.value.code == 2
    assert "unknown model no/such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--bare"], True),
        (["--bare", "--steps", "4"], True),
        (["--bare", "true"], True),
        (["--bare", "false"], False),
        (["--bare=false"], False),
        ([], False),
    ],
)
def test_a_bare_switch_means_true(args, expected):
    assert parse(*args).bare is expected


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\ninner:\n  rate: 0.25\nnames: [x]\n")
    config = parse("--config", str(path), "--steps", "9", "--out", "there")
    assert config == Outer(Path("there"), ("x",), Inner(0.25), None, 9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stepz", "3"], "stepz"),
        (["--inner.raet", "3"], "raet"),
        (["--steps", "many"], "steps"),
        (["--steps", "2.5"], "steps"),
        (["--inner.rate", "fast"], "rate"),
        (["--config", "/nowhere/none.yaml"], "/nowhere/none.yaml"),
        (["--inner.rate", "-1"], "error: rate must be 0 or above, got -1"),
        (["--steps", "0"], "error: steps must be at least 1, got 0"),
    ],
)
def test_errors_on_the_command_line(capsys, args, message):
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3\n", "stepz"),
        ("inner:\n  raet: 3\n", "raet"),
        ("steps: many\n", "steps"),
        ("steps: [1\n", "Problems parsing config"),
    ],
)
def test_errors_in_a_yaml(capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse("--config", str(tmp_path / "c.yaml"))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("clips do not fit"), FileNotFoundError("no file there")])
def test_a_users_error_within_a_recipe_has_a_message(capsys, error):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_recipe(main, Outer, description="A recipe.", args=[])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_within_a_recipe_keeps_its_traceback():
    def main(_):
        raise AssertionError("a defect")

    with pytest.raises(AssertionError):
        run_recipe(main, Outer, description="A recipe.", args=[])


@dataclass(frozen=True)
class Cache:
    """A cache.

    Args:
        folder: where it is.
        max_gib: its size.
    """

    folder: Path | None = field(default=Path("cache"), metadata=MAY_CHANGE_BUT_NOT_TO_NONE)
    max_gib: float = field(default=20.0, metadata=MAY_CHANGE)


@dataclass(frozen=True)
class Resumable:
    """A config with fields that may change on resume.

    Args:
        seed: a number.
        strategy: a name.
        cache: nested, marked field by field.
        judge: nested, marked as a whole.
    """

    seed: int = 0
    strategy: str = field(default="ddp", metadata=MAY_CHANGE)
    cache: Cache = field(default_factory=Cache)
    judge: Inner | None = field(default_factory=Inner, metadata=MAY_CHANGE)


def test_resume_values_omit_changeable_fields():
    assert resume_values(Resumable(seed=3)).as_dict() == {"seed": 3, "cache": {"folder": Path("cache")}}
    assert resume_values(Resumable(cache=Cache(None))).as_dict() == {"seed": 0, "cache": {"folder": None}}
    assert resume_values(Outer(maybe=Inner(1.0))).as_dict() == dataclasses.asdict(Outer(maybe=Inner(1.0)))


def test_a_run_in_another_format_is_rejected(tmp_path):
    write_config(tmp_path, Outer(), name="run")
    path = tmp_path / "run.yaml"
    text = path.read_text()
    assert text.startswith("# run config, format 2\n")
    for other in (text.replace("format 2", "format 1"), text.partition("\n")[2], ""):
        path.write_text(other)
        with pytest.raises(ValueError, match=r"run\.yaml does not start with .*another version of salmonn"):
            write_config(tmp_path, Outer(), name="run")


def test_the_written_yaml_reads_back(config_type, tmp_path):
    mrdpo, sft = config_type("mrdpo"), config_type("sft")
    plain = mrdpo(out=tmp_path)
    odd = mrdpo(
        out=tmp_path,
        references=tmp_path / "own.jsonl",
        heldout_references=tmp_path / "heldout.jsonl",
        sampling=SampleConfig(temperature=1.25, max_new_tokens=7, batch_size=3),
        selection=SelectionConfig(max_length_ratio=2.0),
        lora=LoraConfig(rank=4, targets=("v_proj",)),
        rebirth=None,
    )
    tuned = sft(out=tmp_path, lora=LoraConfig(rank=2), trainable=(), tasks=("questions", "caption"))
    for number, config in enumerate([plain, odd, tuned, sft(out=tmp_path)]):
        write_config(tmp_path, config, name=str(number))
        assert parse("--config", str(tmp_path / f"{number}.yaml"), of=type(config)) == config
