"""`salmonn report`: the rows of a captions file, their pictures, and the page in a real browser."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from salmonn.batch.review import Bar, ReviewRow, find_video, read_rows, word_histogram
from salmonn.batch.thumbnails import PIXELS, submit_thumbnail
from salmonn.caption.loader import ClipReader
from salmonn.files import write_records
from salmonn.media.clip import read_clip
from salmonn.media.container import ClipError
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.records import Caption, Failure
from tests.score.browser import MonitoredPage, needs_browser, start_browser

HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src='http://example.com/x.png' onerror='hacked = 1'>"
VERSION = dict(size_bytes=5, modified_ns=7)


def issues_of(**fields: object) -> tuple[str, ...]:
    return ReviewRow(Caption("a.mp4", **({"text": "A dog barks."} | fields))).issues


def test_issues():
    assert issues_of() == ()
    assert issues_of(finished=False, complete=False, warnings=("lost",)) == ("unfinished", "incomplete", "warnings")
    assert issues_of(text=" ") == ("empty",)
    assert issues_of(text="The dog barks loudly. The dog barks loudly.") == ("repetitive",)


def test_latest_captions_and_outstanding_failures(tmp_path):
    """A failure counts until its part of the same version of the video is captioned; the last reason counts."""
    captions = [
        Caption("a.mp4", "Old.", **VERSION),
        Caption("a.mp4", "Rain falls.", **VERSION),
        Caption("b.mp4", "Rain falls."),
        Caption("b.mp4", "A bell.", start_seconds=2.0),
    ]
    failures = [
        Failure("a.mp4", "settled", **VERSION),
        Failure("a.mp4", "of another version", size_bytes=6, modified_ns=7),
        Failure("c.mp4", "first"),
        Failure("c.mp4", "second"),
        Failure("b.mp4", "b.srt cannot be written", "write"),
    ]
    path = tmp_path / "captions.jsonl"
    write_records(path, captions)
    write_records(tmp_path / "captions.failed.jsonl", failures)
    rows = read_rows(sorted(tmp_path.glob("captions*.jsonl")))
    assert [(row.text, row.num_words, row.issues) for row in rows] == [
        ("Rain falls.", 2, ("same text",)),
        ("Rain falls.", 2, ("same text",)),
        ("A bell.", 2, ()),
        ("of another version", 0, ("failed",)),
        ("second", 0, ("failed",)),
        ("b.srt cannot be written", 0, ("failed",)),
    ]


def test_fused_captions_and_versions_by_etag(tmp_path):
    """A remote file has no time but an ETag; fused captions count if they are named alone."""
    write_records(tmp_path / "captions.jsonl", [Caption("s3://b/a.mp4", "Rain falls.", size_bytes=5, etag="new")])
    failures = [Failure("s3://b/a.mp4", f"failed {etag}", size_bytes=5, etag=etag) for etag in ("new", "newer")]
    write_records(tmp_path / "captions.failed.jsonl", failures)
    write_records(tmp_path / "captions.fused.jsonl", [Caption("s3://b/a.mp4", "Fused.", size_bytes=5, etag="new")])
    rows = read_rows(sorted(tmp_path.glob("captions*.jsonl")))
    assert [row.text for row in rows] == ["Rain falls.", "failed newer"]
    assert [row.text for row in read_rows([tmp_path / "captions.fused.jsonl"])] == ["Fused."]


def test_histogram():
    def bars(*lengths: int) -> list[Bar]:
        return word_histogram([ReviewRow(Caption("a.mp4", " ".join(map(str, range(n))))) for n in lengths], max_bars=4)

    assert bars(1, 1, 3) == [Bar(0, 0, 0), Bar(1, 1, 2), Bar(2, 2, 0), Bar(3, 3, 1)]
    assert bars(1, 4) == [Bar(0, 1, 1), Bar(2, 3, 0), Bar(4, 5, 1)]
    assert bars(19, 20) == [Bar(0, 9, 0), Bar(10, 19, 1), Bar(20, 29, 1)]
    assert bars() == []


def test_find_video(tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.mp4").touch()
    folders = dict(root=tmp_path, captions_dir=tmp_path / "captions")
    assert find_video("a.mp4", **folders) == tmp_path / "captions" / "a.mp4"
    assert find_video("captions/a.mp4", **folders) == tmp_path / "captions" / "a.mp4"
    with pytest.raises(ValueError, match="there is no such file, neither in"):
        find_video("b.mp4", **folders)
    for remote in ("s3://bucket/a.mp4", "https://example.com/a.mp4"):
        with pytest.raises(ValueError, match="is remote"):
            find_video(remote, **folders)


def test_thumbnails_are_of_the_middle(videos, tmp_path):
    """Of the whole clip, and of a part of it."""
    (tmp_path / "text.mp4").write_text("no video")
    whole = read_clip(videos[0], FixedRateSampler(frames_per_second=1e9, max_frames=999, side=96), audio=False)
    with ClipReader(workers=0) as reader:
        for start, end in ((None, None), (0.0, 1.0)):
            jpeg = submit_thumbnail(reader, videos[0], start_seconds=start, end_seconds=end).result()
            picture = Image.open(io.BytesIO(jpeg))
            assert picture.format == "JPEG" and picture.width * picture.height <= PIXELS
            last = whole.duration_seconds if end is None else end
            expected = whole.frames[np.searchsorted(whole.frame_times, last / 2 + 1e-6) - 1]
            differences = [
                np.abs(np.asarray(picture.resize((96, 96))).astype(int) - frame).mean() for frame in whole.frames
            ]
            assert np.abs(np.asarray(picture.resize((96, 96))).astype(int) - expected).mean() < min(differences) + 1
        with pytest.raises(ClipError, match=r"text\.mp4"):
            submit_thumbnail(reader, tmp_path / "text.mp4").result()


@pytest.fixture(scope="module")
def report(videos, tmp_path_factory):
    """A report of 130 captions of five clips, with one of a hostile text, one of a lost file, and a failure."""
    from salmonn.cli.report import report_parser, run_report

    folder = tmp_path_factory.mktemp("report")
    captions = [
        Caption(str(videos[index % 5]), f"Caption number {index} " + "x " * index, sample=index) for index in range(128)
    ]
    captions[1] = Caption(str(videos[1]), HOSTILE, finished=False)
    captions += [Caption("gone.mp4", "A harbour in fog."), Caption("s3://far/away.mp4", "A bell.")]
    captions[2] = Caption(str(videos[2]), "The Dog barks.", warnings=("lost 0.1 s of audio",), complete=False)
    write_records(folder / "captions.jsonl", captions)
    write_records(folder / "captions.failed.jsonl", [Failure("broken.mp4", "broken.mp4: is damaged <b>")])
    flags = [str(folder / "captions.jsonl"), "--out", str(folder / "report.html"), "--workers", "1"]
    assert run_report(report_parser().parse_args(flags)) == 0
    return folder / "report.html"


def test_each_clip_is_read_once_and_reasons_are_given(report):
    text = report.read_text()
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)
    rows, images = map(json.loads, blocks)
    assert len(images) == 5 and all(image.startswith("data:image/jpeg;base64,") for image in images)
    assert [row["image"] for row in rows[:7]] == [0, 1, 2, 3, 4, 0, 1]
    assert (
        "there is no such file" in rows[128]["reason"]
        and rows[129]["reason"] == "the video is remote and is not fetched"
    )
    assert rows[1]["text"] == HOSTILE and text.count("</script>") == 3


@pytest.fixture(scope="module")
def browser():
    with start_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, report):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    monitored = MonitoredPage(context.new_page())
    monitored.page.goto(report.as_uri())
    yield monitored.page
    assert {url.split(":")[0] for url in monitored.requested} <= {"file", "data"}
    assert monitored.page.evaluate("window.hacked") is None and monitored.errors == []
    context.close()


@needs_browser
def test_search_filter_sort_and_pages(page):
    shown, captions = page.locator("#shown"), page.locator("article .caption")
    assert shown.inner_text() == "1\N{EN DASH}48 of 131" and captions.count() == 48
    page.click("#next")
    page.click("#next")
    assert shown.inner_text() == "97\N{EN DASH}131 of 131" and page.locator("#next").is_disabled()
    page.fill("#search", "dog BARKS")
    assert captions.all_inner_texts() == ["The Dog barks."] and shown.inner_text() == "1\N{EN DASH}1 of 1 (131 in all)"
    assert page.locator("article mark").all_inner_texts() == ["Dog", "barks"]
    assert page.locator(".warned").inner_text() == "lost 0.1 s of audio"
    page.fill("#search", "")
    page.get_by_role("radio", name=re.compile("^unfinished")).click()
    assert captions.all_inner_texts() == [HOSTILE]
    page.get_by_role("radio", name=re.compile("^failed")).click()
    assert captions.all_inner_texts() == ["is damaged <b>"]
    page.get_by_role("radio", name=re.compile("^all")).click()
    page.select_option("#sort", "longest")
    assert captions.first.inner_text().startswith("Caption number 127")
    page.fill("#min-words", "4")
    page.fill("#max-words", "5")
    # "Caption number 0", of 3 words, is too short; the texts of the lost file has 4, "Caption number 1" was replaced
    assert captions.all_inner_texts() == ["A harbour in fog."]
    page.locator("#histogram button:enabled").first.click()  # 0 to 9 words
    assert shown.inner_text() == "1\N{EN DASH}8 of 8 (131 in all)"
    assert page.locator("article[data-video='gone.mp4'] .absent").is_visible()


@needs_browser
def test_pictures_and_videos(page, videos):
    article = page.locator("article").first
    assert article.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
    article.get_by_role("button", name=re.compile("Play")).click()
    video = article.locator("video").element_handle()
    page.wait_for_function("video => video.readyState >= 1", arg=video)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window_in_both_colour_schemes(browser, report, width):
    colours = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        monitored = MonitoredPage(context.new_page())
        monitored.page.goto(report.as_uri())
        assert monitored.width() <= width
        colours.append(monitored.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert colours == ["rgb(250, 248, 245)", "rgb(22, 20, 19)"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: there is no such file"),
        (["{captions}", "--thumbnails", "-1"], "--thumbnails must be 0 (none) or more, got -1"),
        (["{captions}", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["{captions}", "--read-seconds", "0"], "limits must be above 0, got 0.0 s"),
        (["{empty}"], "contains no captions"),
    ],
)
def test_wrong_usage(call, tmp_path, flags, message):
    captions, empty = tmp_path / "captions.jsonl", tmp_path / "empty.jsonl"
    write_records(captions, [Caption("a.mp4", "A dog.")])
    empty.touch()
    named = [flag.format(captions=captions, empty=empty) for flag in flags]
    code, _, err = call("report", *named, "--out", tmp_path / "report.html")
    assert code == 2 and message in err and not (tmp_path / "report.html").exists()
    assert call("report", captions, "--out", captions)[0] == 2


def test_without_pictures(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(Path("captions.jsonl"), [Caption("a.mp4", "A dog.")])
    Path("a.mp4").touch()
    code, _, err = call("report", "captions.jsonl", "--out", "new/report.html", "--thumbnails", "0", "--title", "A & B")
    assert code == 0 and "wrote 1 row to new/report.html; 1 without a picture" in err
    text = Path("new/report.html").read_text()
    assert "<h1>A &amp; B</h1>" in text and "only the first 0 clips have pictures (--thumbnails)" in text
