"""End-to-end tests of the shape of captions in `salmonn caption`: presets, named prompts, resuming, what is refused."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from salmonn.caption.presets import preset_names
from salmonn.caption.shape import CaptionShape, Shape
from salmonn.files import read_records
from salmonn.records import Caption, Failure
from salmonn.score.text_spans import count_words
from tests.batch.conftest import reuse
from tests.launch import forked
from tests.limits import RUN_SECONDS
from tests.score.fake_llm_server import Answer

# A run that is killed after it has written the texts beside the second clip, before it writes the record.
KILLED_WHILE_WRITING = """
import os, signal, sys
from salmonn import cli
from salmonn.batch.ledger import Ledger

write, calls = Ledger.write, []

def write_or_die(self, captions):
    calls.append(captions)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, captions)

Ledger.write = write_or_die
cli.main(sys.argv[1:])
"""


@pytest.fixture
def clips_of(short_videos, tmp_path):
    """A folder with the first clips, as a user has them for training."""

    def copy(number: int = 2) -> Path:
        folder = tmp_path / "clips"
        folder.mkdir()
        for index, video in enumerate(short_videos[:number]):
            shutil.copy(video, folder / f"{index}.mp4")
        return folder

    return copy


@pytest.fixture
def run(call, toy, tmp_path, monkeypatch):
    """Caption with the toy model; return exit code, captions and stderr."""
    reuse(toy, monkeypatch)

    def caption(*args: object, out: str = "captions.jsonl") -> tuple[int, list[Caption], str]:
        code, _, err = call("caption", *args, "--out", tmp_path / out, "--workers", 0, "--batch-size", 4)
        path = tmp_path / out
        return code, read_records(path, Caption) if path.exists() else [], err

    return caption


def by_name(captions: list[Caption]) -> dict[str, Caption]:
    return {Path(caption.video).name: caption for caption in captions}


def test_a_folder_for_the_trainer_of_ltx2(clips_of, run):
    """One command, then the file that the trainer's process_dataset.py takes, with videos relative to its folder."""
    folder = clips_of()
    code, captions, err = run(folder, "--preset", "ltx2")
    assert code == 0 and f"2 clips listed in {folder / 'dataset.json'}" in err
    rows = json.loads((folder / "dataset.json").read_text())
    assert {row["video"]: row["caption"] for row in rows} == {n: one.text for n, one in by_name(captions).items()}
    assert [list(row) for row in rows] == [["caption", "video"]] * 2
    assert all((folder / row["video"]).is_file() for row in rows)
    assert "Write 80 to 200 words." in captions[0].prompt and "sound effects" in captions[0].prompt
    assert captions[0].modality == "both"
    # The toy model cannot write so much, and the records and the summary say so.
    assert {caption.shaping["caption"].length for caption in captions} == {"too_short"}
    assert {caption.shaping["caption"].num_answers for caption in captions} == {3}
    assert "2 captions without the requested length or words (see shaping)" in err
    # The same command again does nothing; a file that was edited in between is not overwritten.
    before = (folder / "dataset.json").read_bytes()
    assert run(folder, "--preset", "ltx2")[0] == 0 and (folder / "dataset.json").read_bytes() == before
    (folder / "dataset.json").write_text("[]")
    code, _, err = run(folder, "--preset", "ltx2")
    assert code == 2 and "dataset.json exists and was not written by this run, or has been changed since" in err
    assert run(folder, "--preset", "ltx2", "--replace-subtitles")[0] == 0
    assert (folder / "dataset.json").read_bytes() == before


def test_a_folder_for_trainers_of_wan(clips_of, run):
    """A .txt beside each clip, and the metadata of DiffSynth; flags override the preset."""
    folder = clips_of()
    flags = ("--words", "2-8", "--trigger", "ohwx", "--export", "csv")
    code, captions, _ = run(folder, "--preset", "wan", *flags)
    assert code == 0
    texts = {f"{Path(name).stem}.txt": f"{one.text}\n" for name, one in by_name(captions).items()}
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == texts
    for caption in captions:
        assert caption.modality == "visual" and caption.text.startswith("ohwx, ")
        text, shaping = caption.text.removeprefix("ohwx, "), caption.shaping["caption"]
        assert 2 <= count_words(text) <= 8 and shaping.length in ("ok", "asked_again", "cut")
        assert text.endswith(".")
    rows = json.loads((folder / "metadata.json").read_text())
    assert {row["video"]: row["prompt"] for row in rows} == {n: one.text for n, one in by_name(captions).items()}
    with (folder.parent / "captions.csv").open() as file:
        assert [json.loads(row["shaping"])["caption"]["num_answers"] for row in csv.DictReader(file)] == [
            caption.shaping["caption"].num_answers for caption in captions
        ]


def test_named_prompts_share_one_prefill(clips_of, run, tmp_path, monkeypatch):
    """All prompts of a clip are rows of one batch in which the clip occurs once."""
    from salmonn.model.network import Network

    prefills, prefill = [], Network.prefill

    def counting(self, inputs):
        prefills.append((len(inputs.layouts), inputs.clip_index))
        return prefill(self, inputs)

    monkeypatch.setattr(Network, "prefill", counting)
    (tmp_path / "prompts.yaml").write_text("short: Briefly.\nlong:\n  prompt: At length.\n  prefix: 'ohwx: '\n")
    folder = clips_of()
    code, captions, _ = run(folder, "--prompts", tmp_path / "prompts.yaml", "--export", "txt")
    assert code == 0 and prefills == [(2, (0, 0, 1, 1))]
    for name, caption in by_name(captions).items():
        assert list(caption.captions) == ["short", "long"] and caption.text == caption.captions["short"]
        assert caption.captions["long"].startswith("ohwx: ") and caption.prompt == "Briefly."
        for prompt, text in caption.captions.items():
            assert (folder / f"{Path(name).stem}.{prompt}.txt").read_text() == f"{text}\n"
    assert len(list(folder.glob("*.txt"))) == 4
    # Each is what the prompt alone gives.
    _, alone, _ = run(folder, "--prompt", "At length.", out="alone.jsonl")
    texts = {name: f"ohwx: {caption.text}" for name, caption in by_name(alone).items()}
    assert {name: caption.captions["long"] for name, caption in by_name(captions).items()} == texts


def test_a_run_of_another_shape_is_not_resumed(clips_of, run, tmp_path):
    """Also if the file of prompts changes; a preset is compared by what it says."""
    folder, prompts = clips_of(1), tmp_path / "prompts.yaml"
    prompts.write_text("short: Briefly.\n")
    assert run(folder, "--prompts", prompts)[0] == 0
    assert "already done, skipped" in run(folder, "--prompts", prompts)[2]
    prompts.write_text("short: Briefly!\n")
    code, _, err = run(folder, "--prompts", prompts)
    assert code == 2 and 'prompts {"short": {"prompt": "Briefly."}} (now {"short": {"prompt": "Briefly!"}})' in err
    assert run(folder, "--words", "3-8", out="words.jsonl")[0] == 0
    code, _, err = run(folder, "--words", "3-9", out="words.jsonl")
    assert code == 2 and 'words "3-8" (now "3-9")' in err
    mine = tmp_path / "mine.yaml"
    mine.write_text("words: 3-8\n")
    assert "already done, skipped" in run(folder, "--preset", mine, out="words.jsonl")[2]
    mine.write_text("words: 3-8\nprefix: 'A '\n")
    code, _, err = run(folder, "--preset", mine, out="words.jsonl")
    assert code == 2 and 'prefix null (now "A ")' in err


def test_a_run_of_prompts_with_words_is_resumed(clips_of, run, tmp_path):
    """What was read from the file of prompts is compared with what the job file says."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("short: {prompt: Briefly., include: [red], avoid: [zebra, a dog]}\nlong: At length.\n")
    folder = clips_of()
    assert run(folder, "--prompts", prompts, "--limit", 1)[0] == 0
    code, captions, err = run(folder, "--prompts", prompts)
    assert code == 0 and "1 video already done, skipped" in err and len(captions) == 2
    prompts.write_text("short: {prompt: Briefly., include: [red], avoid: [zebra]}\nlong: At length.\n")
    code, _, err = run(folder, "--prompts", prompts)
    assert code == 2 and '"avoid": ["zebra", "a dog"]' in err


def test_clips_without_sidecars_fail_and_are_retried(clips_of, run, tmp_path):
    folder = clips_of()
    (folder / "0.txt").write_text("A tug.\n")
    flags = ("--prompt", "{sidecar} What else?", "--dataset", folder / "all.jsonl")
    code, captions, err = run(folder, *flags)
    assert code == 1 and [caption.prompt for caption in captions] == ["A tug. What else?"]
    assert f"{folder / '1.mp4'}: {{sidecar}} needs 1.txt next to the clip, and there is none" in err
    assert [Path(one.video).name for one in read_records(tmp_path / "captions.failed.jsonl", Failure)] == ["1.mp4"]
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    assert rows == [{"video": "0.mp4", "caption": captions[0].text}]
    (folder / "1.txt").write_text("A pier.")
    code, captions, _ = run(folder, *flags, "--retry-failed")
    assert code == 0 and captions[-1].prompt == "A pier. What else?"
    assert len((folder / "all.jsonl").read_text().splitlines()) == 2


def test_a_second_stage_by_a_text_model(clips_of, run, serve, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    server = serve(lambda request, number: Answer(f"Better: {request['messages'][0]['content']}"))
    flags = ("--refine", "Rewrite {caption}", "--refine-server", server.url, "--refine-model", "m", "--quiet")
    code, captions, err = run(clips_of(), *flags)
    assert code == 0 and err == ""
    for caption in captions:
        assert caption.text == f"Better: Rewrite {caption.shaping['caption'].draft}"
    job = json.loads((tmp_path / "captions.job.json").read_text())
    assert (job["refine"], job["refine_model"]) == ("Rewrite {caption}", "m")
    assert server.url not in json.dumps(job)
    moved = tuple("http://localhost:9/v1" if flag == server.url else flag for flag in flags)
    code, _, err = run(tmp_path / "clips", *moved)
    assert code == 0 and err == ""


def test_the_same_in_python(videos):
    """With the length of each clip, and one more question to the same clip."""
    from salmonn import Captioner
    from salmonn.caption.captioner import SHIPPED_MODEL
    from salmonn.caption.generator import CaptionRequest

    captioner = Captioner.load(SHIPPED_MODEL)
    encoded, encode = [], captioner.network.encode
    captioner.network.encode = lambda clips, layouts: encoded.append(len(clips)) or encode(clips, layouts)
    shape = Shape({"caption": CaptionShape(prompt="{duration} s", include=("zebra",), refine="Better: {caption}")})
    (caption,) = captioner.caption_many([CaptionRequest(videos[0])], shape=shape)
    assert caption.prompt == "7.6 s" and caption.shaping["caption"].missing_words == ("zebra",)
    assert caption.shaping["caption"].num_answers == 2 and caption.shaping["caption"].draft
    assert encoded == [1]  # for three questions
    failed, _ = captioner.caption_many(
        [CaptionRequest(videos[0]), CaptionRequest(videos[1])],
        shape=Shape({"caption": CaptionShape(prompt="<|im_end|>")}),
    )
    assert isinstance(failed, Failure) and "contains the special token <|im_end|>" in failed.reason


def test_clips_that_do_not_fit_into_memory_together(videos, monkeypatch):
    """They are encoded and asked one by one."""
    from salmonn import Captioner
    from salmonn.caption.captioner import SHIPPED_MODEL
    from salmonn.caption.generator import CaptionRequest
    from salmonn.model.network import Network

    captioner = Captioner.load(SHIPPED_MODEL)
    requests = [CaptionRequest(video) for video in videos[:2]]
    shape = Shape({"caption": CaptionShape(include=("zebra",))})
    expected = list(captioner.caption_many(requests, shape=shape))
    sizes, encode = [], Network.encode

    def encode_one(self, clips, layouts):
        sizes.append(len(clips))
        if len(clips) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return encode(self, clips, layouts)

    monkeypatch.setattr(Network, "encode", encode_one)
    assert list(captioner.caption_many(requests, shape=shape)) == expected
    assert sizes == [2, 2, 1, 1, 2, 1, 1]


def test_a_killed_run_is_resumed(clips_of, run, tmp_path):
    """With named prompts, lengths, texts next to the clips, and the list for the trainer: as in an unbroken run."""
    folder = clips_of(3)
    (tmp_path / "prompts.yaml").write_text("short:\n  prompt: Briefly.\n  words: 2-5\nlong: At length.\n")
    flags = ("--prompts", tmp_path / "prompts.yaml", "--export", "txt", "--dataset", folder / "all.json")
    args = ["caption", folder, *flags, "--out", tmp_path / "captions.jsonl", "--workers", 0, "--batch-size", 1]
    command = forked(sys.executable, "-c", KILLED_WHILE_WRITING, *args)
    killed = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(folder.glob("*.txt"))) == 4 and not (folder / "all.json").exists()
    code, captions, err = run(folder, *flags)
    assert code == 0 and "1 video already done, skipped" in err and len(captions) == 3
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in [*folder.glob("*.txt"), folder / "all.json"]:
        path.unlink()
    _, unbroken, _ = run(folder, *flags, out="unbroken.jsonl")
    assert by_name(unbroken) == by_name(captions)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files and len(files) == 10


def test_named_captions_of_segments(clips_of, run):
    folder = clips_of(1)
    (folder / "p.yaml").write_text("a: Briefly.\nb: {prompt: 'For {duration} s.', prefix: 'B: '}\n")
    code, captions, _ = run(folder, "--prompts", folder / "p.yaml", "--segments", 1, "--export", "srt", "txt")
    assert code == 0 and [caption.num_segments for caption in captions] == [2, 2]
    cues = (folder / "0.b.srt").read_text().strip().split("\n\n")
    assert [cue.split("\n")[2] for cue in cues] == [caption.captions["b"] for caption in captions]
    assert (folder / "0.a.txt").read_text().startswith(f"[00:00:00.000] {captions[0].captions['a']}")


def test_one_caption_for_trainers_and_subtitles_by_segment(clips_of, run, tmp_path):
    """Text and dataset have the fused caption with the trigger once, the subtitles each segment."""
    folder = clips_of(1)
    flags = ("--preset", "wan", "--words", "any", "--trigger", "ohwx", "--segments", 1, "--fuse", "--export", "srt")
    for _ in range(2):  # the second run finds all done, and its own files
        code, captions, err = run(folder, *flags)
        assert code == 0 and len(captions) == 2, err
    (fused,) = read_records(tmp_path / "captions.fused.jsonl", Caption)
    assert fused.text.count("ohwx") == 1 and (folder / "0.txt").read_text() == f"{fused.text}\n"
    assert json.loads((folder / "metadata.json").read_text()) == [{"video": "0.mp4", "prompt": fused.text}]
    cues = (folder / "0.srt").read_text().strip().split("\n\n")
    assert [cue.split("\n")[2] for cue in cues] == [one.text for one in captions]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--words", "120-80"), "the range of words 120-80 is impossible"),
        (("--words", "eighty"), "must be a smallest and a largest number, such as 80-120, got 'eighty'"),
        (("--words", "80-90", "--max-new-tokens", 60), "--max-new-tokens 60 is too small for 80 words"),
        (("--template", ""), "template is empty"),
        (("--trigger", " "), "the trigger is empty; give a word"),
        (("--template", "{caption} {nme}"), "template has the unknown field {nme}"),
        (("--template", "A clip."), "template lacks {caption}"),
        (("--prompt", "Is {nme} there?"), "the prompt has the unknown field {nme}"),
        (("--prompt", "Who?", "--prompts", "p.yaml"), "--prompt and --prompts both say what to ask for"),
        (("--preset", "ltx3"), "there is no preset 'ltx3'"),
        (("--refine", "Improve it."), "refine lacks {caption}"),
        (("--refine-model", "m"), "--refine-server and --refine-model belong to a second stage"),
        (("--refine", "{caption}", "--refine-server", "http://x/v1"), "--refine-server needs the name of a model"),
        (("--refine", "{caption}", "--refine-server", "x", "--refine-model", "m"), "must be an address such as"),
        (("--language", "xx"), "'xx' is not a known code"),
        (("--avoid", "red", "--include", "red car"), "'red car' is to be included and 'red' to be avoided"),
        (
            ("--preset", "ltx2", "--segments", 2),
            "a dataset has one caption for each file, and --segments makes several; add",
        ),
        (("--dataset", "a.xml"), "--dataset a.xml must end in .json, .jsonl, .csv"),
        (("--dataset", "FOLDER/captions.jsonl"), "captions.jsonl would replace another file of this run"),
        (("--dataset", "FOLDER/captions.failed.jsonl"), "captions.failed.jsonl would replace another file of this run"),
        (("--dataset", "FOLDER/captions-1-of-2.fused.jsonl"), "fused.jsonl would replace another file of this run"),
        (
            ("--dataset", "FOLDER/captions.csv", "--export", "csv"),
            "captions.csv would replace another file of this run",
        ),
        (("--dataset", "FOLDER/captions.job.json"), "captions.job.json would replace another file of this run"),
        (("--prompt", "{sidecar}", "--export", "txt"), "{sidecar} reads the text files that txt would write"),
        (("--prompt", "{sidecar}", "--replace-subtitles"), "{sidecar} reads the text files that --replace-subtitles"),
    ],
)
def test_flags_that_are_refused(call, tmp_path, videos, flags, message):
    """In one sentence, before a model is loaded, and without a file."""
    flags = [str(flag).replace("FOLDER", str(tmp_path)) for flag in flags]
    code, _, err = call("caption", videos[0], "--out", tmp_path / "captions.jsonl", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_cannot_be_placed(clips_of, run, call, tmp_path):
    folder = clips_of(1)
    (tmp_path / "list.txt").write_text(f"{folder / '0.mp4'}\n")
    code, _, err = run("--list", tmp_path / "list.txt", "--preset", "ltx2")
    message = "so it is unclear where the dataset file belongs; choose a path with --dataset"
    assert code == 2 and f"the clips come from a list, {message}" in err
    code, _, err = run("--retry-failed", "--preset", "ltx2")
    assert code == 2 and f"no folder is named, {message}" in err
    code, _, err = call("caption", folder, "--out", "-", "--preset", "ltx2")[0:3]
    assert code == 2 and "needs captions in a separate file" in err
    elsewhere = tmp_path / "other" / "dataset.json"
    code, captions, err = run(folder, "--dataset", elsewhere)
    assert code == 2 and f"0.mp4 lies outside {elsewhere.parent}" in err and len(captions) == 1
    assert not elsewhere.exists() and not list(elsewhere.parent.iterdir())


def test_texts_are_taken_as_they_are(clips_of, run):
    """Not as YAML, in which these would be nothing, a number and a mapping."""
    flags = (
        "--suffix",
        " # 4K",
        "--trigger",
        "007",
        "--template",
        '{"text": "{caption}"} {trigger} ',
        "--prompt",
        "# What?",
    )
    code, (caption,), _ = run(clips_of(1), *flags)
    assert code == 0 and caption.prompt == "# What?"
    assert caption.text.startswith('{"text": "') and caption.text.endswith('"} 007  # 4K')


def test_presets_are_listed(call):
    """Without any of the flags that a run needs."""
    code, out, _ = call("caption", "--preset", "list")
    assert code == 0 and "ltx2: LTX-2 trainer" in out and "https://github.com/kohya-ss/musubi-tuner" in out
    code, out, _ = call("caption", "--help")
    assert f"Presets for trainers of video generators: {', '.join(preset_names())};" in " ".join(out.split())
