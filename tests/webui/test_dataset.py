"""The tab Dataset: its filters, edits and access without a browser, then with a real server and a real browser."""

import json
import re
import threading
from collections.abc import Iterator
from functools import lru_cache

import gradio as gr
import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from salmonn.batch import review
from salmonn.batch.edits import Edit, EditableCaptions
from salmonn.batch.export import LatestCaptions
from salmonn.batch.review import ReviewRow
from salmonn.caption.loader import ClipReader
from salmonn.files import write_records
from salmonn.preference.feedback import FeedbackStore, read_feedback
from salmonn.preference.rating import Rating, rewards_by_sample
from salmonn.records import Caption
from salmonn.score.repetition import count_repeated_words
from salmonn.webui.dataset import Dataset, DatasetVideos, Replacement
from salmonn.webui.dataset_tab import DatasetTab, _difference
from tests.score.browser import needs_browser
from tests.webui.conftest import write_dataset

RATER = "a0" * 16


@pytest.fixture(scope="module")
def reader() -> Iterator[ClipReader]:
    with ClipReader(workers=1) as reader:
        yield reader


@pytest.fixture
def dataset(tmp_path, clips, reader) -> Dataset:
    captions = EditableCaptions(write_dataset(tmp_path, clips))
    rewards = {(row.record.video, row.record.sample): 1.0 for row in captions.rows().values() if row.num_words}
    rewards[clips.references[0].video, 5] = -2.0
    return Dataset(captions, FeedbackStore(tmp_path / "votes"), reader, clips.root, rewards)


@pytest.fixture
def tab(dataset) -> DatasetTab:
    with gr.Blocks(), gr.Tab("Dataset") as tab:
        return DatasetTab(dataset, tab)


def numbers(dataset, show: str, search: str = "") -> list[int]:
    return [one.number for one in dataset.find(show=show, search=search)]


def test_filters(dataset):
    """The median has 5 words: fewer than 2.5 are short, more than 10 are long."""
    assert len(numbers(dataset, "all")) == 31 and numbers(dataset, "failed") == [30]
    assert numbers(dataset, "unfinished") == [1] and numbers(dataset, "repetitive") == [2]
    assert numbers(dataset, "short") == [3] and numbers(dataset, "long") == [2]
    assert numbers(dataset, "all", "DOG howls") == [1] and numbers(dataset, "failed", "dog") == []
    dataset.edit([Edit(1, "A dog barks & <b>howls</b>.", "A dog barks and howls.")])
    dataset.accept(3, "Rain.")
    assert numbers(dataset, "edited") == [1] and numbers(dataset, "accepted") == [3]
    assert numbers(dataset, "to review") == [0, 2, *range(4, 30)]
    # a new start reads what was done; an accepted text that is edited later is not accepted any more
    again = Dataset(dataset.captions, dataset.feedback, dataset.reader, dataset.root)
    assert numbers(again, "edited") == [1] and numbers(again, "accepted") == [3]
    dataset.edit([Edit(3, "Rain.", "Rain falls.")])
    assert numbers(dataset, "edited") == [1, 3] and numbers(dataset, "accepted") == []


def test_a_page_measures_its_own_rows_alone(tmp_path, clips, reader, monkeypatch):
    """Finding repetition takes milliseconds for each caption, which would add up to minutes in a large file."""
    measured = []

    def count(text):
        measured.append(text)
        return count_repeated_words(text)

    monkeypatch.setattr(review, "_count_repeated_words", lru_cache(count))
    rows = Dataset(
        EditableCaptions(write_dataset(tmp_path, clips)), FeedbackStore(tmp_path / "votes"), reader, clips.root
    ).find(show="to review", search="red circle")
    assert len(rows) > 5 and not measured
    assert rows[0].row.issues == () and measured == [rows[0].row.text]


def test_low_rewards(dataset):
    """The lowest tenth of 30 rewards reaches to the one of the fourth place."""
    dataset.rewards = {key: float(place) for place, key in enumerate(dataset.rewards)}
    assert numbers(dataset, "low reward") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"two rewards of a\.mp4"):
        rewards_by_sample([Rating("a.mp4", {"r": 1.0}, {"r": 1.0})] * 2)


def test_edits_are_feedback(dataset, clips):
    text = "A red circle, number 5."
    dataset.edit([Edit(5, text, "A red disc.")], rater=RATER, keep_videos=True)
    dataset.accept(6, "A red circle, number 6.", rater=RATER)
    edited, accepted = dataset.feedback.read()
    assert (edited.action, edited.first.text, edited.own_text, edited.rater) == ("edit", text, "A red disc.", RATER)
    assert (
        edited.video == clips.references[0].video and (dataset.feedback.folder / "videos" / edited.kept_video).exists()
    )
    assert (accepted.action, accepted.own_text, accepted.kept_video, accepted.tab) == ("accept", "", "", "dataset")
    with pytest.raises(ValueError, match="has changed since"):
        dataset.accept(5, text)


@pytest.mark.parametrize(
    ("replacement", "expected", "num_places"),
    [
        (Replacement("red", "blue"), "A blue reddish blue.", 2),
        (Replacement("red", "blue", match_case=True), "A blue reddish Red.", 1),
        (Replacement("red", "blue", whole_words=False), "A blue bluedish blue.", 3),
        (Replacement("Red.", r"\1 $1"), r"A red reddish \1 $1", 1),
        (Replacement("a.", "b"), "A red reddish Red.", 0),
    ],
)
def test_replacements(dataset, replacement, expected, num_places):
    dataset.edit([Edit(3, "Rain.", "A red reddish Red.")])
    edits, places = replacement.edits([one for one in dataset.rows() if one.number == 3])
    assert ([edit.text for edit in edits] or ["A red reddish Red."]) == [expected] and places == num_places


def test_differences():
    assert _difference("a red dog", "a blue dog") == [("a ", "a "), ("red", "blue"), (" ", " "), ("dog", "dog")]


def form(tab, command=None, **changes):
    values = {
        tab.search: "", tab.show: "all", tab.page: 0, tab.keep: False, tab.command: json.dumps(command),
        tab.rater: RATER, tab.edits: None, tab.find: "", tab.replacement: "", tab.match_case: False,
        tab.whole_words: True,
    }  # fmt: skip
    return values | {getattr(tab, name): value for name, value in changes.items()}


def obey(tab, command) -> str:
    return next(iter(tab.obey(form(tab, command))))[tab.status]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ({"act": "save", "row": 0, "before": "Other.", "text": "New."}, "Somebody else has changed this caption"),
        ({"act": "save", "row": 3, "before": "Rain.", "text": " "}, "The caption is empty"),
        ({"act": "save", "row": 30, "before": "", "text": "New."}, "There is no caption to edit"),
        ({"act": "save", "row": "x", "before": "", "text": "New."}, "no valid command"),
        ({"act": "save", "row": 3, "before": "Rain.", "text": "\ud800"}, "half of a Unicode character"),
        ({"act": "save", "row": 3, "before": "Rain.", "text": "x" * 20_001}, "20,001 characters"),
        ({"act": "save"}, "no valid command"),
        ({"act": "accept", "row": 3, "before": "Snow."}, "has changed since it was shown"),
    ],
)
def test_refused_commands(tab, command, message):
    assert message in obey(tab, command)
    assert tab.dataset.feedback.read() == [] and numbers(tab.dataset, "edited") == []


def test_a_saved_edit_is_shown(tab):
    update = next(iter(tab.obey(form(tab, {"act": "save", "row": 3, "before": "Rain.", "text": "Rain <i>falls."}))))
    assert "Saved." in update[tab.status] and 'data-saved="3"' in update[tab.grid]
    assert "Rain &lt;i&gt;falls." in update[tab.grid] and "<i>falls" not in update[tab.grid]
    assert "<b>howls" not in update[tab.grid]


def test_find_and_replace_makes_what_was_previewed(tab):
    """Of the filtered rows; what somebody changes between preview and replacement is left as it is."""
    values = form(tab, find="circle", replacement="disc", search="number 1")
    preview = tab.show_changes(values)
    # 10 to 19; the search finds the digit in 21 as well, and in the file names of clips
    rows = tab.dataset.find(show="all", search="number 1")
    changed = [one for one in rows if "circle" in one.row.text]
    assert f"{len(changed)} places in {len(changed)} captions, of {len(rows)} rows" in preview[tab.changes]
    assert "<del>circle,</del><ins>disc,</ins>" in preview[tab.changes] and preview[tab.replace]["interactive"]
    other = changed[0]
    tab.dataset.edit([Edit(other.number, other.row.text, "Something else.")])
    done = next(iter(tab.replace_all(form(tab, edits=preview[tab.edits]))))
    assert f"{len(changed) - 1} captions changed. 1 caption skipped" in done[tab.status] and done[tab.edits] is None
    texts = {one.number: one.row.text for one in tab.dataset.rows()}
    assert texts[other.number] == "Something else." and texts[changed[1].number] == changed[1].row.text.replace(
        "circle", "disc"
    )
    assert "Preview first" in next(iter(tab.replace_all(form(tab))))[tab.status]
    assert "enter a text to find" in tab.show_changes(form(tab, find=" "))[tab.changes].lower()


def test_two_replacements_at_once(tab):
    """Each caption gets one of them."""
    previews = [tab.show_changes(form(tab, find="circle", replacement=text))[tab.edits] for text in ("disc", "ball")]
    threads = [threading.Thread(target=lambda e=edits: list(tab.replace_all(form(tab, edits=e)))) for edits in previews]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [one.row.text for one in tab.dataset.rows() if ", number" in one.row.text]
    assert len(texts) == 27 and all(("disc" in text) != ("ball" in text) for text in texts)
    assert len(tab.dataset.feedback.read()) == 27


def test_subtitles(tab, tmp_path, clips, reader):
    (tmp_path / "videos").mkdir()
    video = tmp_path / "videos" / "a.mp4"
    video.write_bytes((clips.root / clips.references[0].video).read_bytes())
    write_records(
        tmp_path / "own.jsonl", [Caption("videos/a.mp4", "A dog.", end_seconds=1.0), Caption("no.mp4", "A cat.")]
    )
    tab.dataset = Dataset(EditableCaptions(tmp_path / "own.jsonl"), tab.dataset.feedback, reader, tmp_path)
    said = tab.write_subtitles(["srt", "txt"])
    assert "txt, srt files written for 1 video; 1 file not written: no.mp4: there is no such file" in said
    assert video.with_suffix(".txt").read_text() == "A dog.\n"
    tab.dataset.edit([Edit(0, "A dog.", "A dog barks.")])
    tab.write_subtitles(["txt"])
    assert video.with_suffix(".txt").read_text() == "A dog barks.\n"
    assert "Choose a format" in tab.write_subtitles([])


def test_only_videos_of_shown_rows_are_served(dataset, clips):
    """By their random names, also parts of them; not by paths, nor what is not of the captions file."""
    app = DatasetVideos(PlainTextResponse("the web UI"), dataset=dataset)
    client = TestClient(app)
    rows = dataset.rows()
    url = dataset.video_url(rows[0].row)
    content = (clips.root / clips.references[0].video).read_bytes()
    assert client.get(f"/{url}").content == content and client.get(f"/{url}").headers["content-type"] == "video/mp4"
    part = client.get(f"/{url}", headers={"Range": "bytes=2-5"})
    assert part.status_code == 206 and part.content == content[2:6]
    assert dataset.video_url(rows[5].row) == url and dataset.video_url(rows[1].row) != url
    assert dataset.video_url(rows[4].row) == dataset.video_url(rows[30].row) == ""  # no file
    secret = dataset.captions.files.out.with_name("secret.txt")
    secret.write_text("secret")
    (secret.with_name("link.mp4")).symlink_to(secret)
    for named in (secret, secret.with_name("link.mp4")):
        assert dataset.video_url(ReviewRow(Caption(str(named), "A dog."))) == ""
    for name in ("x", "%2e%2e/captions.jsonl", str(clips.root / clips.references[0].video)):
        assert client.get(f"/dataset-video/{name}").status_code == 404
    assert client.get("/").text == client.post(f"/{url}").text == "the web UI"


def test_pictures_have_reasons_without_folders(dataset, clips):
    rows = [one.row for one in dataset.rows()]
    assert dataset.pictures(rows[:1], only_known=True)[0].url == ""
    pictures = dataset.pictures([rows[0], rows[4]])
    assert pictures[0].url.startswith("data:image/jpeg;base64,") and pictures[1].reason == "there is no such file"
    assert dataset.pictures(rows[:1], only_known=True) == pictures[:1]


def test_a_running_search_is_cancelled_by_an_edit(dataset):
    """Its result is older than the edit, and would replace the message that the edit is saved."""
    with gr.Blocks() as blocks, gr.Tab("Dataset") as tab:
        made = DatasetTab(dataset, tab)
    events = blocks.get_config_file()["dependencies"]

    def of(component, name):
        return [one for one in events if (component._id, name) in map(tuple, one["targets"])]

    searches = {one["id"] for component in (made.search, made.show) for one in of(component, "change")}
    for button in (made.command_button, made.replace):
        assert len(searches) == 2 and {one for click in of(button, "click") for one in click["cancels"]} == searches


def open_tab(visitor):
    """Open the tab, and wait for its rows and pictures."""
    visitor.page.get_by_role("tab", name="Dataset").click()
    visitor.page.locator("#dataset-grid img").first.wait_for()
    return visitor.page


@needs_browser
def test_review_in_the_browser(visit, demo, clips):
    page = open_tab(visit())
    cards = page.locator("#dataset-grid .row")
    counts = page.locator("#dataset-status .counts")
    assert counts.inner_text() == "1\N{EN DASH}24 of 31 rows" and cards.count() == 24
    page.get_by_role("button", name="Next", exact=True).click()
    page.get_by_text("25\N{EN DASH}31 of 31 rows").wait_for()
    assert page.locator(".row.failed .text").inner_text() == "is damaged"
    for name, text in {"unfinished": "A dog barks & <b>howls</b>.", "long": "A long one", "short": "Rain."}.items():
        page.locator("#dataset-filter").get_by_label(name, exact=True).check()
        counts.get_by_text("1\N{EN DASH}1 of 1 row").wait_for()
        cards.get_by_text(text).wait_for()
    page.locator("#dataset-filter").get_by_label("all", exact=True).check()
    counts.get_by_text("of 31 rows").wait_for()
    page.get_by_label("Search").fill("dog")
    counts.get_by_text("1\N{EN DASH}1 of 1 row").wait_for()
    # an edit that is not saved survives an update of the grid
    cards.get_by_role("button", name="Edit").click()
    cards.locator("textarea").fill("A dog barks and howls.")
    for search, shown in {"": "of 31 rows", "barks": "1\N{EN DASH}1 of 1 row"}.items():
        page.get_by_label("Search").fill(search)
        counts.get_by_text(shown).wait_for()
        cards.locator("textarea").wait_for()
        assert cards.locator("textarea").input_value() == "A dog barks and howls."
    cards.get_by_role("button", name="Save").click()
    page.locator("#dataset-status .verdict").get_by_text("Saved.").wait_for()
    cards.locator(".text").get_by_text("A dog barks and howls.").wait_for()
    assert cards.locator(".reviewed").inner_text() == "edited" and cards.locator("textarea").count() == 0
    cards.get_by_role("button", name="Accept").click()
    cards.locator(".reviewed").get_by_text("accepted").wait_for()
    (edited, accepted) = [one for one in read_feedback(demo.votes) if one.tab == "dataset"]
    assert (edited.action, accepted.action) == ("edit", "accept") and re.fullmatch("[0-9a-f]{32}", edited.rater)
    cards.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('#dataset-grid video').readyState >= 1")


@needs_browser
def test_somebody_else_edits_the_same_caption(visit, demo):
    first, second = open_tab(visit()), open_tab(visit())
    for page in (first, second):
        page.get_by_label("Search").fill("rain")
        page.locator("#dataset-status").get_by_text("1\N{EN DASH}1 of 1 row").wait_for()
        page.locator("#dataset-grid").get_by_text("Rain.").wait_for()
        page.locator("#dataset-grid").get_by_role("button", name="Edit").click()
        page.locator("#dataset-grid textarea").fill(f"Rain, said by {'Ann' if page is first else 'Bob'}.")
    first.get_by_role("button", name="Save").click()
    first.locator("#dataset-grid .text").get_by_text("Rain, said by Ann.").wait_for()
    second.get_by_role("button", name="Save").click()
    second.get_by_text("Somebody else has changed this caption").wait_for()
    assert second.locator("#dataset-grid textarea").input_value() == "Rain, said by Bob."
    second.get_by_role("button", name="Cancel").click()
    second.locator("#dataset-grid .text").get_by_text("Rain, said by Ann.").wait_for()


@needs_browser
def test_find_and_replace_in_the_browser(visit, demo):
    page = open_tab(visit())
    page.get_by_label("Search").fill("number 7")
    page.locator("#dataset-status").get_by_text(re.compile(r"of \d rows?$")).wait_for()
    page.locator("#dataset-replace button").first.click()
    assert page.get_by_role("button", name="Replace all").is_disabled()
    page.get_by_label("Find", exact=True).fill("circle")
    page.get_by_label("Replace with").fill("disc")
    page.get_by_role("button", name="Preview").click()
    page.locator("#dataset-changes del").first.wait_for()
    assert "circle" in page.locator("#dataset-changes del").first.inner_text()
    page.get_by_role("button", name="Replace all").click()
    page.locator("#dataset-status .verdict").get_by_text("changed.").wait_for()
    page.locator("#dataset-grid .text").get_by_text("A red disc, number 7.").wait_for()
    captions = demo.votes.parent / "set" / "captions.jsonl"
    assert "A red disc, number 7." in [one.text for one in LatestCaptions([captions])]


@needs_browser
def test_the_tab_fits_a_phone_in_dark_colours(visit):
    """In light colours: `test_layout_on_a_phone`."""
    visitor = visit(viewport=(390, 844), color_scheme="dark")
    assert visitor.width() <= 390
    page = open_tab(visitor)
    page.locator("#dataset-replace button").first.click()
    page.locator("#dataset-more button").first.click()
    page.locator("#dataset-grid").get_by_role("button", name="Edit").first.click()
    page.wait_for_function("document.documentElement.scrollWidth <= 390")  # while a tab is mounted, it is wider
    colours = [
        page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
        for selector in ("body", "#dataset-grid .row")
    ]
    assert colours[0] == "rgb(15, 14, 13)" and colours[1] not in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "absent.jsonl"], "absent.jsonl: there is no such file"),
        (["--rewards", "r.jsonl"], "--rewards are those of the captions of --dataset"),
    ],
)
def test_wrong_usage(call, tmp_path, flags, message):
    code, _, err = call("demo", "--port", "0", "--votes", tmp_path / "votes", *flags)
    assert code == 2 and message in err


def test_videos_need_their_random_name(demo):
    assert httpx.get(f"{demo.address}dataset-video/captions.jsonl", trust_env=False).status_code == 404
