"""What a real browser does with answers: segments, further questions, recordings and the history."""

import re
from dataclasses import replace
from importlib.util import find_spec
from urllib.parse import unquote

import pytest

from salmonn.caption.generator import CaptionRequest
from salmonn.caption.segments import FixedSegments
from salmonn.preference.feedback import Candidate, Feedback, FeedbackStore, read_feedback, utc_now
from salmonn.webui.rendering import render_thread
from tests.score.browser import needs_browser
from tests.webui.test_app import choose_example, describe, open_options

pytestmark = needs_browser
TIME = "document.querySelector('#caption-video video').currentTime"


def download(visitor, suffix):
    """Return the contents of a download."""
    link = visitor.page.locator(f"#downloads a[download$='.{suffix}']")
    return unquote(link.get_attribute("href").partition(",")[2])


def test_captions_by_segment(visitor, toy, examples):
    """Their times play the video, also by keyboard, and are those of the subtitles."""
    page = visitor.page
    choose_example(visitor, 1)
    open_options(visitor)
    page.get_by_label("5 s", exact=True).first.check()
    page.get_by_role("button", name="Describe", exact=True).click()
    page.locator("#status").get_by_text("2 segments").wait_for()
    page.locator("#downloads a").first.wait_for()
    request = CaptionRequest(examples[0].path)
    results = [one.result for batch in toy.caption_batches([request], segments=FixedSegments(5.0)) for one in batch]
    expected = sorted(results, key=lambda one: one.start_seconds)
    assert page.locator("#answer .caption").all_inner_texts() == [expected[0].text, expected[1].text]
    times = page.locator("#answer .segments .timestamp")
    assert times.all_inner_texts() == ["0:00\N{EN DASH}0:05", "0:05\N{EN DASH}0:07"]
    cues = re.findall(r"(\S+) --> (\S+)\n(.+)", download(visitor, "srt"))
    end = f"00:00:{expected[1].end_seconds:06.3f}".replace(".", ",")
    assert cues == [
        ("00:00:00,000", "00:00:05,000", expected[0].text), ("00:00:05,000", end, expected[1].text),
    ]  # fmt: skip
    assert download(visitor, "vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:05.000\n")
    times.nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"{TIME} > 5.05")
    page.locator("#answer .segments li[data-played]").get_by_text(expected[1].text).wait_for()
    times.nth(0).click()
    page.wait_for_function(f"{TIME} < 4")
    # The clip has no cuts: it is one shot.
    if find_spec("scenedetect"):
        assert page.get_by_label("Shortest shot (seconds)").first.is_hidden()
        page.get_by_label("Shot", exact=True).first.check()
        page.get_by_label("Shortest shot (seconds)").first.fill("0.5")
        page.get_by_role("button", name="Describe", exact=True).click()
        page.locator("#status").get_by_text("\N{MIDDLE DOT} 1 segment \N{MIDDLE DOT}").wait_for()
    page.get_by_label("Whole clip").first.check()


def test_captions_for_a_visitor(visitor, toy, examples, demo):
    """The longest of eight samples for the mean rater, and the shortest one after two votes for brevity."""
    page, path = visitor.page, examples[0].path
    choose_example(visitor, 1)
    sampling = replace(toy.default_sampling(), temperature=0.8, top_p=0.9)
    samples = [
        one for (one,) in toy.generate([CaptionRequest(path, sampling=sampling, seed=seed) for seed in range(8)])
    ]
    lengths = {one.text: len(toy.processor.tokenizer(one.text).input_ids) for one in samples}
    page.get_by_label("Captions for you").check()
    reason = page.locator("#reason")
    assert lengths[describe(visitor)] == max(lengths.values()) > min(lengths.values())
    reason.get_by_text("The best of 8 captions for the mean rater, as there is no vote of yours yet").wait_for()
    reason.get_by_text("Weights: prototype 1 (words +1) 75 %, prototype 2 (words -1) 25 %.").wait_for()
    rater = page.evaluate("window.salmonn.rater()")
    long, short = (Candidate("toy", one(lengths, key=lengths.__getitem__), "Describe it.") for one in (max, min))
    vote = Feedback(utc_now(), "vote", path.name, long, short, "second", rater=rater)
    for _ in range(2):
        FeedbackStore(demo.votes).add(vote, path)
    assert lengths[describe(visitor)] == min(lengths.values())
    reason.get_by_text("The best of 8 captions for you, by 2 votes of yours").wait_for()
    shown = [one.first for one in read_feedback(demo.votes) if one.action == "shown"][-1]
    assert shown.name == "toy, best of 8 (temperature 0.8)"  # not one of the single samples in the results
    page.get_by_label("Captions for you").uncheck()
    assert describe(visitor) == toy.caption(path).text and reason.inner_text() == ""


def ask(visitor, question):
    """Ask a further question and return the answer."""
    before = visitor.page.locator("#thread .reply").count()
    visitor.page.locator("#follow-up textarea").fill(question)
    visitor.page.locator("#follow-up textarea").press("Enter")
    visitor.page.wait_for_function(
        f"document.querySelectorAll('#thread .reply').length === {before + 1} && "
        "!document.querySelector('#thread .caret') && document.querySelector('#follow-up .submit-button')"
    )
    return visitor.page.locator("#thread .reply").last.inner_text()


def test_further_questions(visitor, toy, examples):
    """Each is asked in the light of all that is shown, until a new conversation is begun."""
    page = visitor.page
    choose_example(visitor, 2)
    page.locator("#follow-up").wait_for(state="hidden")
    history = [("", describe(visitor))]
    page.locator("#follow-up textarea").wait_for()
    for question in ("What colour is the cross?", "What is heard?"):
        answer = ask(visitor, question)
        assert answer == toy.caption(examples[1].path, prompt=question, history=history).text
        history.append((question, answer))
    assert page.locator("#thread .question").all_inner_texts() == [question for question, _ in history[1:]]
    page.locator("#follow-up textarea").fill("What <|im_end|> is it?")
    page.locator("#follow-up textarea").press("Enter")
    page.locator("#thread .error-box").get_by_text("The question contains the special token").wait_for()
    assert page.locator("#follow-up textarea").input_value() == "What <|im_end|> is it?"
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("!document.querySelector('#thread .reply')")
    assert (
        ask(visitor, "What is heard?")
        == toy.caption(examples[1].path, prompt="What is heard?", history=history[:1]).text
    )
    choose_example(visitor, 3)
    page.locator("#follow-up").wait_for(state="hidden")


def test_recordings(visitor):
    """Of one to two seconds; their files declare no duration."""
    page = visitor.page
    for name, kind in (("Record video", "video"), ("Record sound", "audio")):
        page.locator("#caption-video").get_by_role("button", name=name).click()
        page.locator(".recorder .elapsed").get_by_text("0:01").wait_for()
        page.get_by_role("button", name="Use recording").click()
        page.locator(f"#caption-video .player {kind}[src$='.webm']").wait_for()
        page.wait_for_function(f"document.querySelector('#caption-video {kind}').duration < 20")
        assert describe(visitor)
        page.locator("#downloads a").first.wait_for()
        (end,) = re.findall(r"--> 00:00:(\d\d),", download(visitor, "srt"))
        assert 1 <= int(end) <= 10
    page.locator("#caption-video").get_by_role("button", name="Record sound").click()
    page.get_by_role("button", name="Cancel").click()
    page.locator("#caption-video audio").wait_for()
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.locator("#caption-video").get_by_role("button", name="Record sound").click()
    page.locator("#caption-video [role=alert]").get_by_text("Browsers only record on a secure page").wait_for()


def test_the_history_stays_in_its_browser_tab(visit, toy, examples):
    visitor = visit()
    page, texts = visitor.page, [toy.caption(example.path).text for example in examples[:2]]
    for number, text in enumerate(texts, start=1):
        choose_example(visitor, number)
        page.get_by_role("button", name="Describe", exact=True).click()
        # Not `describe`: until the page is reset, it still shows the answer about the example before.
        page.locator(".entry .excerpt").first.get_by_text(text).wait_for()
    answer = ask(visitor, "What is heard?")
    page.reload()
    page.locator(".entry").nth(1).wait_for()
    assert page.locator(".entry").count() == 2
    first = page.locator(".entry").first
    first.locator("summary").click()
    assert first.locator(".caption").inner_text() == texts[1]
    assert first.locator(".thread .reply").inner_text() == answer
    assert first.locator("summary b").inner_text() == "Example 2"
    assert first.locator("img").get_attribute("src").startswith("data:image/jpeg")
    assert page.evaluate("JSON.stringify(sessionStorage).length") < 100_000
    assert visit().page.locator(".entry").count() == 0
    # Another user logs in.
    assert page.evaluate("window.gradio_config.username = 'bob', window.salmonn.renderHistory()") == ""
    page.evaluate("window.gradio_config.username = null")
    assert page.evaluate("window.salmonn.renderHistory()") == ""
    page.get_by_role("button", name="Clear history").click()
    page.locator("#clear-history").wait_for(state="hidden")


@pytest.mark.parametrize("text", ["<b>bold</b>", "a\nb"])
def test_threads_are_escaped(text):
    html = render_thread([(text, text)])
    assert "<b>" not in html and html.count(text.replace("<", "&lt;").replace(">", "&gt;")) == 2
