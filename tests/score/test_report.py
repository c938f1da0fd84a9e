"""The report: its contents, and its behaviour in a real browser."""

import re
import shutil

import pytest

from salmonn.records import Caption, Event, JudgeInfo, Mention, Reference, Score, Unscored
from salmonn.score.metrics import compute_rates
from salmonn.score.report import Report, write_report
from tests.score.browser import MonitoredPage, needs_browser, start_browser

CIRCLE = Event("a red circle appears", "visual", 1.0, 2.0)
DOG = Event("a grey dog barks", "audio", 2.5, 3.5)
RAIN = Event("rain & <b>thunder</b> are heard", "audio", 3.0, 4.2)
HELLO = Event('a man says "hello"', "speech")
SHAPES = tuple(Event(f"shape {number} appears", "visual", float(number), number + 1.0) for number in range(4))
HOSTILE = "</script><script>window.hacked = 1</script><img src='http://example.com/x.png' onerror='window.hacked = 1'>"
# No file has this name, and it must not become a link.
NOWHERE = "javascript:window.hacked=1"
PLAIN = ("The red circle appears.", "A blue dog barks twice.", "Bells ring softly.", "The red circle appears.")
TEXT = f"{PLAIN[0]} {PLAIN[1]} {PLAIN[2]} {HOSTILE}. {PLAIN[3]}"


def three_scores(first: str, second: str) -> dict[str, Score]:
    """4 + 4 + 2 events: 2 + 0 + 2 missed, 1 incorrect, 1 + 1 hallucinated; Totals 4/4, 1/4, 2/2."""
    mentions = (Mention(CIRCLE, "the red circle appears"), Mention(DOG, "a blue dog barks", is_correct=False))
    lists = {"missed": (RAIN.text, HELLO.text), "mentions": mentions, "hallucinations": ("bells ring softly",)}
    right = tuple(Mention(event, "four shapes appear") for event in SHAPES)
    return {
        "first": Score(first, 4, 2, 1, 1, num_words=20, num_repeated_words=4, finished=False, **lists),
        "second": Score(second, 4, 0, 0, 1, num_words=5, mentions=right, hallucinations=("a whale",)),
        "absent": Score(NOWHERE, 2, 2, 0, 0, missed=(SHAPES[0].text, SHAPES[1].text)),
    }


def two_videos(clips) -> tuple[Reference, Reference]:
    """Return the video with the higher Total, which is last by name, and the other one."""
    return clips.references[1], clips.references[0]


def make_report(clips, **changes) -> Report:
    """Return a report on two real videos and one that does not exist."""
    first, second = (reference.video for reference in two_videos(clips))
    scores = list(three_scores(first, second).values())
    durations = {reference.video: reference.duration_seconds for reference in clips.references}
    events = {first: (CIRCLE, DOG, RAIN, HELLO), second: SHAPES, NOWHERE: SHAPES[:2]}
    fields = {
        "title": "Hasty <i>captions</i>",
        "judge_info": JudgeInfo(
            "a/judge", "abc123", "salmonn", "2026-11-22T10:00:00+00:00", "0.1", (4, 5), (0.65, 0.7), 1
        ),
        "rates": compute_rates(scores),
        "scores": scores,
        "unscored": [Unscored("videos/odd.mp4", "no usable <reply> in 3 attempts", sample=2)],
        "captions": [Caption(second, "Four shapes appear. " + "x" * 300), Caption(first, TEXT, finished=False)],
        "media_dir": clips.root,
        "intervals": {"total": (0.5, 0.85)},
        "references": {
            video: Reference(video, events[video], duration_seconds=durations.get(video)) for video in events
        },
        "published": {"missing": 0.25},
        "notes": ["1 of 3 references has no caption & counts as all missing."],
    }
    return Report(**(fields | changes))


@pytest.fixture
def page_text(clips, tmp_path):
    write_report(tmp_path / "report.html", make_report(clips))
    return (tmp_path / "report.html").read_text()


def test_file_contents_are_escaped(page_text):
    assert page_text.count("<script>") == page_text.count("</script>") == 1
    assert "<i>captions" not in page_text and "<b>thunder" not in page_text and "<reply>" not in page_text
    assert "<img" not in page_text
    assert NOWHERE in page_text and f'src="{NOWHERE}' not in page_text


def test_nothing_to_report(clips, tmp_path):
    with pytest.raises(ValueError, match="no caption was scored"):
        write_report(tmp_path / "report.html", make_report(clips, scores=[]))


def test_embedded_size_is_limited_and_the_worst_clips_come_first(clips, tmp_path, monkeypatch):
    # Room for the worst clip's video only; the page is above the videos, so that their addresses are relative.
    size = (clips.root / two_videos(clips)[0].video).stat().st_size
    monkeypatch.setattr("salmonn.score.report._ALL_EMBEDDED_BYTES", size)
    shutil.copytree(clips.root, tmp_path / "set")
    write_report(tmp_path / "report.html", make_report(clips, media_dir=tmp_path / "set"))
    write_report(tmp_path / "elsewhere" / "report.html", make_report(clips))
    sources = re.findall(r'<video[^>]*src="([^"]*)"', (tmp_path / "report.html").read_text())
    assert [source[:22] for source in sources] == ["data:video/mp4;base64,", f"set/{two_videos(clips)[1].video}"[:22]]
    far = re.findall(r'<video[^>]*src="([^"]*)"', (tmp_path / "elsewhere" / "report.html").read_text())
    assert far[1] == (clips.root / two_videos(clips)[1].video).as_uri()


def test_parts_of_a_video_keep_their_captions_and_events(clips, tmp_path):
    # The second part misses the second of two events with the same text; the first part mentions its only event.
    video = clips.references[0].video
    early, late = Event("a beep", "audio", 0.0, 1.0), Event("a beep", "audio", 3.0, 4.0)
    first = Score(video, 1, 0, 0, 0, mentions=(Mention(early, "beep"),), end_seconds=2.0)
    scores = [first, Score(video, 1, 1, 0, 0, missed=("a beep",), start_seconds=2.0)]
    captions = [Caption(video, "Beep one.", end_seconds=2.0), Caption(video, "Two.", start_seconds=2.0)]
    references = {video: Reference(video, (early, late))}
    changes = {"scores": scores, "captions": captions, "references": references, "unscored": []}
    write_report(tmp_path / "report.html", make_report(clips, **changes))
    cards = (tmp_path / "report.html").read_text().split("<article")[1:]
    assert "Two." in cards[0] and 'data-seek="3.0"' in cards[0] and 'data-seek="0.0"' not in cards[0]
    assert "Beep</mark> one." in cards[1] and 'data-seek="3.0"' not in cards[1]


def test_events_with_the_same_text_are_each_mentioned_or_missed_once(clips, tmp_path):
    video = clips.references[0].video
    beeps = [Event("a beep", "audio", start, start + 1.0) for start in (0.0, 2.0, 4.0)]
    scores = [Score(video, 3, 2, 0, 0, missed=("a beep", "a beep"), mentions=(Mention(beeps[1], "beep"),))]
    changes = {"scores": scores, "captions": [], "references": {video: Reference(video, tuple(beeps))}}
    write_report(tmp_path / "report.html", make_report(clips, **changes))
    missed = (tmp_path / "report.html").read_text().split('<ul class="events missed">')[1].split("</ul>")[0]
    assert re.findall('data-seek="(.*?)"', missed) == ["0.0", "4.0"]


def test_only_the_worst_are_shown_but_all_are_counted(clips, tmp_path):
    scores = [Score(f"{errors}.mp4", 10, errors, 0, 0) for errors in (3, 17, 9, 10)]
    changes = {
        "scores": scores,
        "worst": 2,
        "references": {},
        "judge_info": JudgeInfo("rule", "p", "salmonn", "d", "v"),
    }
    write_report(tmp_path / "report.html", make_report(clips, **changes))
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'data-name="(.*?)"', text) == ["17.mp4", "10.mp4"]
    # 30 %, 90 %, 100 %, and 170 % in the last, open-ended column: 16 columns
    counts = re.findall(r'aria-label="Total from (.*?) %.*?: (\d+) captions"', text)
    assert [start for start, count in counts if count == "1"] == ["30", "90", "100", "150"] and len(counts) == 16
    assert "Passes" not in text and "The judge lists no events" in text


@pytest.fixture(scope="module")
def browser():
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report_file(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_report(clips))
    return path


@pytest.fixture
def monitored(browser, report_file):
    """Open the page in a laptop's window; it must not request anything else or cause errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    monitored = MonitoredPage(context.new_page())
    monitored.page.goto(report_file.as_uri())
    yield monitored
    assert {url.split(":")[0] for url in monitored.requested} <= {"file", "data"}
    assert monitored.page.evaluate("window.hacked") is None
    assert monitored.errors == []
    context.close()


def cell_texts(page, row: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#measure-{row} td.number").all_text_contents()]


def visible_videos(page) -> list[str]:
    return page.locator("article:visible").evaluate_all("cards => cards.map(card => card.dataset.name)")


@needs_browser
def test_rates_and_charts(monitored, clips):
    page = monitored.page
    # (2 + 0 + 2) / 10, 1 / 10, (1 + 1) / 10; repeated 4 of 25 words; cut off 1 of 3
    assert cell_texts(page, "missing") == ["40.0 %", "", "25.0 %"]
    assert cell_texts(page, "incorrect") == ["10.0 %", "", ""]
    assert cell_texts(page, "hallucinated") == ["20.0 %", "", ""]
    assert cell_texts(page, "total") == ["70.0 %", "50.0 \N{EN DASH} 85.0 %", ""]
    assert cell_texts(page, "repetition") == ["16.0 %", "", ""]
    assert cell_texts(page, "cut_off") == ["33.3 %", "", ""]
    assert page.locator("#split .figure").all_inner_texts() == ["40.0 %", "10.0 %", "20.0 %"]
    # visual: 2 of 7 missed; audio: the rain missed, the dog incorrect; speech: 1 of 1 missed
    assert [" ".join(text.split()) for text in page.locator("#modalities .figure").all_inner_texts()] == [
        "28.6 % missed 0.0 % incorrect",
        "50.0 % missed 50.0 % incorrect",
        "100.0 % missed 0.0 % incorrect",
    ]
    bars = page.locator("#modalities .bar .missed").evaluate_all("bars => bars.map(bar => bar.offsetWidth)")
    assert bars[1] == pytest.approx(bars[2] / 2, abs=1) and bars[2] > 50
    assert page.locator(".passes .kept").inner_text().split() == ["70.0", "%", "seed", "5"]
    head = page.locator("body > header").inner_text()
    for text in ("Hasty <i>captions</i>", "a/judge", "abc123", "2026-11-22 10:00:00 UTC", "no caption & counts"):
        assert text in head
    assert not page.get_by_text("no usable <reply> in 3 attempts").is_visible()
    page.get_by_text("1 caption the judge could not judge").click()
    assert page.get_by_text("no usable <reply> in 3 attempts").is_visible()


@needs_browser
def test_highlights(monitored, clips):
    card = monitored.page.locator(f"article[data-name='{two_videos(clips)[0].video}']")
    assert card.locator(".caption").text_content() == TEXT
    kinds = ("correct", "incorrect", "hallucinated")
    highlighted = {kind: card.locator(f"mark.{kind}").all_text_contents() for kind in kinds}
    assert highlighted == {
        "correct": ["The red circle appears"],
        "incorrect": ["A blue dog barks"],
        "hallucinated": ["Bells ring softly"],
    }
    assert "The red circle appears" in card.locator("mark.repeated").all_text_contents()
    lines = card.locator("mark").evaluate_all(
        "marks => marks.map(mark => [mark.className, getComputedStyle(mark).textDecorationLine + ' ' + "
        "getComputedStyle(mark).textDecorationStyle])"
    )
    # the kinds differ not only in colour
    assert dict(lines) | {"incorrect": "underline wavy", "repeated": "line-through solid"} == dict(lines)
    assert len({dict(lines)[kind] for kind in (*kinds, "repeated")}) == 4
    missed = [" ".join(text.split()) for text in card.locator("ul.missed li").all_text_contents()]
    assert missed == ["0:03.0\N{EN DASH}0:04.2 rain & <b>thunder</b> are heard audio", 'a man says "hello" speech']
    assert "described as a blue dog barks" in " ".join(card.locator("ul.incorrect li").inner_text().split()).replace(
        '"', ""
    )
    assert "a whale hallucinated" in " ".join(monitored.page.locator("ul.unlocated").inner_text().split()).replace(
        '"', ""
    )


@needs_browser
def test_filter_and_order(monitored, clips):
    page = monitored.page
    first, second = (reference.video for reference in two_videos(clips))
    assert visible_videos(page) == [NOWHERE, first, second]  # equal Totals by name
    for kind, videos in {
        "missed": [NOWHERE, first],
        "incorrect": [first],
        "hallucinated": [first, second],
        "repeated": [first],
        "all": [NOWHERE, first, second],
    }.items():
        page.get_by_role("radio", name=re.compile(f"^{kind}")).click()
        assert visible_videos(page) == videos
        assert f"{len(videos)} of 3 shown" == page.locator("#shown").inner_text()
    page.keyboard.press("ArrowRight")  # the filter has the focus
    assert visible_videos(page) == [NOWHERE, first]
    page.get_by_role("radio", name=re.compile("^all")).click()
    page.select_option("#sort select", "name")
    assert visible_videos(page) == [NOWHERE, second, first]
    page.select_option("#sort select", "total")
    assert visible_videos(page) == [NOWHERE, first, second]


@needs_browser
def test_the_video_plays_and_events_seek(monitored, clips):
    page = monitored.page
    reference = two_videos(clips)[0]
    first = page.locator(f"article[data-name='{reference.video}']")
    video = first.locator("video")
    page.wait_for_function("video => video.readyState >= 1", arg=video.element_handle())
    assert video.evaluate("video => video.duration") == pytest.approx(reference.duration_seconds, abs=0.2)
    current_time = "video => video.currentTime"
    first.locator("ul.missed .when").click()
    assert video.evaluate(current_time) == RAIN.start_seconds
    first.locator("mark.incorrect").click(position={"x": 9, "y": 9})  # on its text
    assert video.evaluate(current_time) == DOG.start_seconds
    first.locator("mark.correct").press("Enter")
    assert video.evaluate(current_time) == CIRCLE.start_seconds
    first.locator(".time .missed").click()
    assert video.evaluate(current_time) == RAIN.start_seconds
    video.evaluate("video => { video.currentTime = 0; video.muted = true; return video.play(); }")
    page.wait_for_function("video => video.currentTime > 0.2", arg=video.element_handle())
    assert page.locator(f"article[data-name='{NOWHERE}'] video").count() == 0
    assert page.get_by_text("No file of that name").is_visible()


@needs_browser
def test_a_large_video_is_read_from_its_file(browser, clips, tmp_path):
    # A box of zeros, which players skip, makes it exceed 4 MiB; the name must be quoted in a URL.
    name, size = "odd #1 50%?.mp4", 4 * 2**20 + 8
    content = (clips.root / clips.references[0].video).read_bytes()
    (tmp_path / name).write_bytes(content + size.to_bytes(4) + b"free" + bytes(size - 8))
    changes = {"scores": [Score(name, 1, 1, 0, 0, missed=("a beep",))], "captions": [Caption(name, "Nothing.")]}
    write_report(tmp_path / "report.html", make_report(clips, media_dir=tmp_path, **changes))
    monitored = MonitoredPage(browser.new_page())
    monitored.page.goto((tmp_path / "report.html").as_uri())
    video = monitored.page.locator("video").element_handle()
    monitored.page.wait_for_function("video => video.readyState >= 1", arg=video)
    assert monitored.page.get_by_text("read from its file").is_visible()
    assert (tmp_path / "report.html").stat().st_size < 100_000
    assert monitored.errors == []


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window_in_both_colour_schemes(browser, report_file, width):
    background_colours = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        monitored = MonitoredPage(context.new_page())
        monitored.page.goto(report_file.as_uri())
        assert monitored.width() <= width
        background_colours.append(monitored.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert background_colours == ["rgb(250, 248, 245)", "rgb(22, 20, 19)"]


@needs_browser
def test_without_script_everything_is_shown_without_controls(browser, report_file):
    context = browser.new_context(java_script_enabled=False)
    page = MonitoredPage(context.new_page()).page
    page.goto(report_file.as_uri())
    assert page.locator("article:visible").count() == 3
    assert page.locator("#filter:visible, #sort:visible").count() == 0
    assert page.locator("mark[role], mark[tabindex]").count() == 0
    context.close()
