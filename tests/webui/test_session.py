"""State that sessions share: uploads, which are deleted after use, examples, and answers of models."""

import errno
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.media.container import ClipError
from salmonn.model.layout import ClipInfo
from salmonn.preference.feedback import FeedbackStore
from salmonn.records import Caption
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.scene import SynthConfig
from salmonn.webui.scorer import CaptionScorer
from salmonn.webui.session import ActiveRequests, AppState, error_message, make_example_clips, to_caption
from salmonn.webui.uploads import UploadStore


def upload(root, name, content="x"):
    """Store a file like Gradio does: in a folder named by the hash of its content."""
    path = root / f"hash-of-{content}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_an_upload_is_deleted_with_its_last_session(tmp_path):
    uploads, path = UploadStore(tmp_path), upload(tmp_path, "a.mp4")
    uploads.retain("ann", "caption", path)
    uploads.retain("ann", "comparison", path)
    uploads.retain("bob", "caption", path)
    uploads.retain("ann", "caption", None)
    uploads.end_session("ann")
    assert path.exists()
    uploads.retain("bob", "caption", upload(tmp_path, "b.mp4", "y"))  # replaces the other one
    assert not path.parent.exists() and len(list(tmp_path.iterdir())) == 1
    uploads.end_session("bob")
    uploads.end_session("bob")
    assert not list(tmp_path.iterdir())


def test_a_file_retained_twice_stays(tmp_path):
    uploads, path = UploadStore(tmp_path), upload(tmp_path, "a.mp4")
    uploads.retain("ann", "caption", path)
    uploads.retain("ann", "caption", path)
    assert path.exists()


def test_equal_content_under_another_name_stays(tmp_path):
    uploads, first, second = UploadStore(tmp_path), upload(tmp_path, "a.mp4"), upload(tmp_path, "b.mp4")
    uploads.retain("ann", "caption", first)
    uploads.retain("bob", "caption", second)
    uploads.end_session("ann")
    assert not first.exists() and second.exists()
    uploads.end_session("bob")
    assert not list(tmp_path.iterdir())


def test_an_ended_session_retains_nothing(tmp_path):
    """A late event would retain the file forever."""
    uploads, path = UploadStore(tmp_path), upload(tmp_path, "a.mp4")
    uploads.end_session("ann")
    uploads.retain("ann", "comparison", path)
    age(path)
    uploads.delete_unused()
    assert not list(tmp_path.iterdir())


def age(path, seconds=16 * 60):
    os.utime(path, (time.time() - seconds,) * 2)


def test_unused_files_are_deleted_after_some_time(tmp_path):
    uploads = UploadStore(tmp_path / "uploads")
    partial, new, retained, old = uploads.root / "tmpab12", *(upload(uploads.root, name, name) for name in "abc")
    partial.write_bytes(b"partial")
    outside = upload(tmp_path, "d")
    uploads.retain("ann", "caption", retained)
    for path in (partial, retained, old, outside):
        age(path)
    age(new, 14 * 60)
    uploads.delete_unused()
    assert sorted(uploads.root.iterdir()) == sorted([new.parent, retained.parent]) and outside.exists()
    assert new.exists() and retained.exists()


def test_no_file_outside_the_uploads_is_deleted(tmp_path):
    uploads = UploadStore(tmp_path / "uploads")
    example = upload(tmp_path, "example.mp4")
    traversal = tmp_path / "uploads" / ".." / "hash-of-x" / "example.mp4"
    for path in (example, traversal):
        uploads.retain("ann", "caption", path)
        uploads.end_session("ann")
    assert example.exists()


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_example_clips(tmp_path_factory.mktemp("examples"), SynthConfig(clips=2, seed=7))


def test_examples_have_stills_and_references(examples):
    assert len(examples) == 2
    for example in examples:
        assert example.path.stat().st_size > 1000 and example.still.read_bytes().startswith(b"\x89PNG")
        assert example.reference.events and example.reference.caption


@dataclass
class ScriptedEngine:
    """A fake engine: sends the deltas of an answer when allowed to, and records its calls."""

    text: str
    may_answer: threading.Event = field(default_factory=threading.Event)
    requests: list = field(default_factory=list)
    cancelled: int = 0
    calls: list = field(default_factory=list)

    def submit(self, request, *, on_event):
        self.requests.append((request.seed, request.num_samples))

        def answer():
            self.may_answer.wait()
            for sample in range(request.num_samples):
                on_event(sample, TextDelta(self.text))
                on_event(sample, TextDelta("", Completion(f"{self.text}{sample}", True)))

        threading.Thread(target=answer, daemon=True).start()
        return self

    def cancel(self):
        self.cancelled += 1

    def stop(self):
        self.calls.append("stop")

    def close(self, *, grace_seconds):
        self.calls.append("close")


def make_state(tmp_path, **engines):
    return AppState(engines, CaptionScorer(RuleJudge()), FeedbackStore(tmp_path / "votes"), [], UploadStore(tmp_path))


def test_two_samples_of_one_model_are_one_request(tmp_path):
    one = ScriptedEngine("a")
    one.may_answer.set()
    state = make_state(tmp_path, one=one)
    request = CaptionRequest(tmp_path / "v.mp4", seed=5)
    received = [item for item in state.stream_answers(request, ["one", "one"]) if item]
    assert one.requests == [(5, 2)] and one.cancelled == 1
    assert [(index, delta.completion.text) for index, delta in received if delta.completion] == [(0, "a0"), (1, "a1")]


def test_two_models_answer_concurrently_and_closing_cancels_both(tmp_path):
    one, two = ScriptedEngine("a"), ScriptedEngine("b")
    two.may_answer.set()
    state = make_state(tmp_path, one=one, two=two)
    events = state.stream_answers(CaptionRequest(tmp_path / "v.mp4"), ["one", "two"])
    received = [next(events), next(events)]
    assert [(index, delta.text) for index, delta in received] == [(1, "b"), (1, "")]
    assert next(events) is None  # no text of the first model yet
    events.close()
    assert (one.cancelled, two.cancelled) == (1, 1)


def test_an_error_of_one_model_cancels_both(tmp_path):
    class Broken(ScriptedEngine):
        def submit(self, request, *, on_event):
            on_event(0, ClipError("v.mp4: is not a video"))
            return self

    one, two = ScriptedEngine("a"), Broken("b")
    with pytest.raises(ClipError, match="is not a video"):
        list(make_state(tmp_path, one=one, two=two).stream_answers(CaptionRequest(tmp_path / "v.mp4"), ["one", "two"]))
    assert (one.cancelled, two.cancelled) == (1, 1)


def test_all_engines_stop_before_any_closes(tmp_path):
    calls = []
    make_state(tmp_path, one=ScriptedEngine("a", calls=calls), two=ScriptedEngine("b", calls=calls)).close()
    assert calls == ["stop", "stop", "close", "close"]


def test_active_requests():
    """A session's next request cancels the previous one; so does another video, but not the same one."""
    requests, one, two = ActiveRequests(), Path("one.mp4"), Path("two.mp4")
    first = requests.start("ann", one)
    assert not requests.switch_video("ann", "one.mp4") and not first.is_cancelled
    second = requests.start("ann", two)
    assert first.is_cancelled and not second.is_cancelled
    requests.stop("ann")
    requests.stop("bob")
    assert second.is_stopped and not second.is_cancelled
    assert requests.switch_video("ann", None) and second.is_cancelled
    assert requests.switch_video("ann", "two.mp4")  # without a request
    third = requests.start("bob", one)
    requests.cancel("bob")
    requests.cancel("bob")
    assert third.is_cancelled and not third.is_stopped


def test_late_changes_do_not_cancel_a_request():
    """A user chose "two", then "one", and pressed the button; both changes arrive after the click."""
    requests = ActiveRequests()
    active = requests.start("ann", Path("one.mp4"), clicked=30.0)
    assert not requests.switch_video("ann", "two.mp4", changed=10.0)
    assert not requests.switch_video("ann", "one.mp4", changed=40.0)  # the browser may raise it after the click
    assert not active.is_cancelled
    assert requests.switch_video("ann", "two.mp4", changed=50.0) and active.is_cancelled


def test_error_messages_contain_no_paths(tmp_path):
    path = tmp_path / "holiday.mp4"
    message = error_message(ClipError(f"{path}: is not a video ({path} ends)"), path)
    assert message == "is not a video (holiday.mp4 ends)"


def test_error_messages_of_the_system_contain_no_details(tmp_path, caplog):
    path = tmp_path / "holiday.mp4"
    assert "No space left on device (see the server's log" in error_message(
        OSError(errno.ENOSPC, "No space left on device", str(path)), path
    )
    for error in (OSError(f"{tmp_path}/secret"), RuntimeError(f"{tmp_path}/secret of the model")):
        message = error_message(error, path)
        assert type(error).__name__ in message and "secret" not in message and str(tmp_path) not in message
    assert "secret of the model" in caplog.text


def test_an_answer_as_a_caption(tmp_path):
    answer = Completion("A.", False, ClipInfo("audio", is_complete=False, warnings=("lost 1 s of audio",)))
    assert to_caption(CaptionRequest(tmp_path / "v.mp4"), answer, "toy") == Caption(
        "v.mp4",
        "A.",
        model="toy",
        finished=False,
        complete=False,
        modality="audio",
        warnings=("lost 1 s of audio",),
    )
