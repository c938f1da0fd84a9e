"""Edits of captions: what exports and later runs read, beside runs and other people who write to the same files."""

import json
import os
import threading

import pytest

from salmonn.batch.discovery import VideoFile
from salmonn.batch.edits import Edit, EditableCaptions
from salmonn.batch.export import LatestCaptions
from salmonn.batch.ledger import Ledger
from salmonn.batch.ledger_files import LedgerFiles, append_records
from salmonn.files import read_records, write_json, write_records
from salmonn.records import Caption, Failure, Shaping

JOB = {"model": "m"}
VERSION = dict(size_bytes=5, modified_ns=7)


def whole(name: str, text: str) -> Caption:
    return Caption(
        name, text, finished=False, logprob=-3.0, num_tokens=4, captions={"short": text, "long": "L"}, **VERSION
    )


def segments(name: str, *texts: str) -> list[Caption]:
    return [
        Caption(name, text, start_seconds=float(number), end_seconds=number + 1.0, segment=number,
                num_segments=len(texts), **VERSION)
        for number, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """A run over a.mp4 and the two segments of b.mp4."""
    files = LedgerFiles(tmp_path / "captions.jsonl")
    with Ledger(files, job=JOB) as ledger:
        ledger.write([whole("a.mp4", "A dog.")])
        ledger.write(segments("b.mp4", "A red car.", "A bell."))
    return files


def texts(files: LedgerFiles) -> dict[tuple[str, int], str]:
    return {(one.video, one.segment): one.text for one in LatestCaptions(files.all_captions())}


def number_of(captions: EditableCaptions, text: str) -> int:
    (number,) = (number for number, row in captions.rows().items() if row.text == text)
    return number


def edit(captions: EditableCaptions, before: str, text: str) -> list[int]:
    return captions.apply([Edit(number_of(captions, before), before, text)])[1]


def status(files: LedgerFiles, name: str) -> str:
    with Ledger(files, job=JOB) as ledger:
        return ledger.status(VideoFile(name, **VERSION))


def test_later_runs_and_exports_read_the_edit_and_the_original_line_stays(files):
    captions = EditableCaptions(files.captions)
    lines = files.captions.read_text().splitlines()
    assert edit(captions, "A bell.", "A bell rings.") == [] and edit(captions, "A dog.", "A dog barks.") == []
    assert texts(files) == {("a.mp4", 0): "A dog barks.", ("b.mp4", 0): "A red car.", ("b.mp4", 1): "A bell rings."}
    assert files.captions.read_text().splitlines()[:3] == lines
    (edited,) = [one for one in read_records(files.captions, Caption) if one.text == "A dog barks."]
    assert (edited.finished, edited.logprob, edited.num_tokens) == (True, None, None)
    assert edited.captions == {"short": "A dog barks.", "long": "L"}
    # the segments of an edited video are together, or a run would caption it again
    assert status(files, "a.mp4") == status(files, "b.mp4") == "done"
    assert list(captions.rows()) == [0, 1, 2] and number_of(captions, "A dog barks.") == 0


def test_what_others_have_changed_is_refused(files):
    """Two people, each with a process of their own."""
    ann, bob = EditableCaptions(files.captions), EditableCaptions(files.captions)
    row = number_of(bob, "A dog.")
    edit(ann, "A dog.", "A dog barks.")
    before, conflicts = bob.apply([Edit(row, "A dog.", "A cat."), Edit(number_of(bob, "A bell."), "A bell.", "Bells.")])
    assert conflicts == [row] and [one.text for one in before] == ["A bell."]
    assert texts(files) == {("a.mp4", 0): "A dog barks.", ("b.mp4", 0): "A red car.", ("b.mp4", 1): "Bells."}


def test_a_run_and_two_people_write_at_once(files):
    """No line is lost or torn, and of two edits of one caption one is refused."""
    num_captions = 60
    refused: list[int] = []

    def run() -> None:
        with Ledger(files, job=JOB, lines_per_file=20) as ledger:
            start.wait()
            for number in range(num_captions):
                ledger.write([whole(f"{number}.mp4", f"Caption {number}.")])

    def person(name: str) -> None:
        captions, text = EditableCaptions(files.captions), "A bell."
        start.wait()
        for number in range(15):
            new = f"{name} {number}"
            if edit(captions, text, new):
                refused.append(1)
                return
            text = new

    def shared(name: str) -> None:
        captions = EditableCaptions(files.captions)
        row = number_of(captions, "A dog.")
        start.wait()
        refused.extend(captions.apply([Edit(row, "A dog.", name)])[1])

    jobs = [run, lambda: person("ann"), lambda: shared("x"), lambda: shared("y")]
    start = threading.Barrier(len(jobs))
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = texts(files)
    assert all(found[f"{number}.mp4", 0] == f"Caption {number}." for number in range(num_captions))
    assert found["b.mp4", 1] == "ann 14" and found["a.mp4", 0] in ("x", "y") and len(refused) == 1
    lines = [line for path in files.all_captions() for line in path.read_text().splitlines()]
    assert len(lines) == 3 + num_captions + 15 * 2 + 1 and all(map(json.loads, lines))
    assert status(files, "b.mp4") == "done"


def test_after_a_killed_run(files):
    """A torn line is cut off; the edit survives the next run, which captions the unfinished video again."""
    append_records(files.captions, segments("c.mp4", "One.", "Two.")[:1])
    with files.captions.open("a") as file:
        file.write('{"video": "d.mp4", "te')
    edit(EditableCaptions(files.captions), "A dog.", "A dog barks.")
    assert status(files, "c.mp4") == "pending" and status(files, "a.mp4") == "done"
    assert texts(files)["a.mp4", 0] == "A dog barks." and "d.mp4" not in files.captions.read_text()


def test_full_files(files):
    files.captions.rename(files.next_full())
    edit(EditableCaptions(files.next_full().with_name("captions.00001.jsonl")), "A dog.", "A dog barks.")
    assert texts(files)["a.mp4", 0] == "A dog barks."
    assert [one.video for one in read_records(files.captions, Caption)] == ["a.mp4"]


def test_the_order_of_shards_is_kept(tmp_path):
    """An edit of the older shard's caption does not bring back its other captions, which have been replaced since."""
    write_json(tmp_path / "captions.job.json", {"format": 1})
    older, newer = (tmp_path / f"captions-{number}-of-2.jsonl" for number in (1, 2))
    write_records(older, [whole("a.mp4", "Old."), whole("b.mp4", "A bell.")])
    write_records(newer, [whole("a.mp4", "New.")])
    os.utime(older, ns=(10**18, 10**18))
    captions = EditableCaptions(newer)
    edit(captions, "A bell.", "A bell rings.")
    assert texts(captions.files) == {("a.mp4", 0): "New.", ("b.mp4", 0): "A bell rings."}
    assert len(read_records(older, Caption)) == 3


def test_what_cannot_be_edited(files, tmp_path):
    write_records(files.failed, [Failure("c.mp4", "is damaged")])
    captions = EditableCaptions(files.captions)
    with pytest.raises(ValueError, match="there is no caption to edit"):
        captions.apply([Edit(number_of(captions, "is damaged"), "is damaged", "A dog.")])
    with pytest.raises(ValueError, match="there is no caption to edit"):
        captions.apply([Edit(99, "A dog.", "A cat.")])
    with pytest.raises(ValueError, match="there is no such file"):
        EditableCaptions(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("text", "bare"), [("ohwx, A cat. End", "A cat."), ("A cat.", None), ("ohwx, A cat.", None), ("ohwx, End", None)]
)
def test_an_edited_caption_knows_its_templates(tmp_path, text, bare):
    """So that a fused caption has the trigger once; an edit that removes it is the whole caption."""
    files = LedgerFiles(tmp_path / "captions.jsonl")
    shaping = {"caption": Shaping(bare="A dog.")}
    with Ledger(files, job=JOB) as ledger:
        ledger.write([Caption("a.mp4", "ohwx, A dog. End", shaping=shaping, **VERSION)])
    edit(EditableCaptions(files.captions), "ohwx, A dog. End", text)
    assert read_records(files.captions, Caption)[-1].shaping["caption"].bare == bare
