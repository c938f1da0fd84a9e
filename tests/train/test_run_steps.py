"""Settings of existing results are compared on resume: what is kept, refused and redone."""

from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.files import read_json
from salmonn.train.loop import FitConfig
from salmonn.train.run_folder import RunConfig
from salmonn.train.run_steps import SETTINGS_NAME, Step, choose_settings, fingerprint, flat_settings, open_steps

NAMES = ("a/captions", "a/pairs", "a/model", "a/heldout", "b/model")


def plan(**settings) -> list[Step]:
    """Return steps with a setting each: captions -> pairs -> model -> next model; nothing needs heldout."""
    needs = {"a/pairs": ("a/captions",), "a/model": ("a/pairs",), "a/heldout": ("a/model",), "b/model": ("a/model",)}
    return [
        Step(name, {"value": settings.get(name.replace("/", "_"), 1)}, (f"{name}*",), name, needs.get(name, ()))
        for name in NAMES
    ]


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def existing(folder: Path) -> list[str]:
    return [name for name in NAMES if (folder / name).exists()]


@pytest.fixture
def run(tmp_path):
    open_steps(tmp_path, plan())
    make(tmp_path, "a/captions", "a/pairs", "a/model")
    return tmp_path


def test_settings_of_later_steps_may_change(run):
    open_steps(run, plan(b_model=2, a_heldout=2))
    assert existing(run) == ["a/captions", "a/pairs", "a/model"]
    assert read_json(run / SETTINGS_NAME)["b/model"] == {"value": 2}
    make(run, "b/model.partial")  # from now on it depends on them
    with pytest.raises(ValueError, match=r"b/model was made with another configuration: value 2 \(now 1\)"):
        open_steps(run, plan(a_heldout=2))


def test_a_changed_setting_is_refused_with_what_to_pass(run):
    with pytest.raises(ValueError) as caught:
        open_steps(run, plan(a_pairs=2))
    assert str(caught.value) == (
        f"{run}/a/pairs was made with another configuration: value 1 (now 2). Set it back, choose another --out, or "
        "pass --redo-from a/pairs to redo that and what depends on it, or --redo-from a/heldout to keep all steps "
        "before that"
    )
    assert read_json(run / SETTINGS_NAME)["a/pairs"] == {"value": 1}


def test_redoing_deletes_a_step_and_what_depends_on_it(run):
    make(run, "a/heldout", "b/model")
    open_steps(run, plan(a_pairs=2), redo_from="a/pairs")
    assert existing(run) == ["a/captions"]
    make(run, "a/pairs")
    open_steps(run, plan(a_pairs=2), redo_from="a/pairs")  # the same command resumes
    open_steps(run, plan(a_pairs=2))
    assert existing(run) == ["a/captions", "a/pairs"]


def test_an_evaluation_is_redone_alone(run):
    make(run, "a/heldout", "b/model")
    open_steps(run, plan(a_heldout=2), redo_from="a/heldout")
    assert existing(run) == ["a/captions", "a/pairs", "a/model", "b/model"]


def test_steps_before_redo_from_are_kept(run, caplog):
    """A new value from the second model on; the first is kept with the old one."""
    open_steps(run, plan(a_model=2, b_model=2), redo_from="b/model")
    make(run, "b/model")
    open_steps(run, plan(a_model=2, b_model=2), redo_from="b")  # a folder stands for its first step
    assert existing(run) == ["a/captions", "a/pairs", "a/model", "b/model"]
    steps = [*plan(), Step("b/c/d", {}, (), "b/c/d")]
    open_steps(run, steps, redo_from="b/c")  # which may have folders of its own
    assert read_json(run / SETTINGS_NAME)["a/model"] == {"value": 1}
    assert "keeping a/model, which was made with value 1 (now 2)" in caplog.text


def test_a_step_whose_file_was_deleted_still_counts(run):
    """The pairs were made from the captions, so their settings matter as long as the pairs exist."""
    (run / "a/captions").unlink()
    with pytest.raises(ValueError, match="a/captions was made with"):
        open_steps(run, plan(a_captions=2))


def test_steps_that_a_configuration_lacks_for_a_while(run):
    """They are kept as long as what they were made from is, and deleted with it."""
    make(run, "b/model")

    def short_plan(**settings):
        captions, _, model, heldout, _ = plan(**settings)
        return [captions, replace(model, needs=("a/captions",)), heldout]

    open_steps(run, short_plan(a_heldout=2))
    open_steps(run, plan(a_heldout=2))
    assert existing(run) == ["a/captions", "a/pairs", "a/model", "b/model"]
    open_steps(run, short_plan(a_captions=2), redo_from="a/captions")
    assert existing(run) == []
    make(run, "a/captions", "a/model")
    open_steps(run, plan(a_captions=2))


def test_an_unknown_step_is_refused(run):
    with pytest.raises(ValueError, match=r"there is no step a/pears; this run has a/captions, a/pairs, "):
        open_steps(run, plan(), redo_from="a/pears")


def test_flat_settings():
    config = RunConfig(out=Path("run"), model="tiny", strategy="zero2", frames={"max_frames": 8})
    settings = flat_settings(config)
    assert settings["placement.dtype"] == "float32" and settings["out"] == "run"
    assert settings["frames"] == {"max_frames": 8} and "strategy" not in settings
    assert set(choose_settings(settings, "placement", "seed")) >= {"placement.dtype", "placement.attention", "seed"}
    assert choose_settings({"fit": 1, "fitness": 2, "fit.steps": 3}, "fit") == {"fit": 1, "fit.steps": 3}
    assert "checkpoint_every" not in flat_settings(FitConfig())


def test_fingerprints_follow_content():
    assert fingerprint(["a", "b"]) == fingerprint(iter(["a", "b"])) != fingerprint(["b", "a"])
