"""The web UI with a real server and a real browser."""

import re
import wave

import httpx
import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling, Span
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import read_clip
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.preference.feedback import read_feedback
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.score.repetition import find_clauses
from salmonn.synthetic.judge import RuleJudge
from salmonn.webui.scorer import CaptionScorer
from tests.limits import STEP_SECONDS, wait_until
from tests.score.browser import needs_browser

pytestmark = needs_browser


@pytest.fixture(scope="module")
def long_video(clips, tmp_path_factory):
    """A clip with unique content that has not been uploaded yet."""
    path = tmp_path_factory.mktemp("own") / "my holiday.mp4"
    path.write_bytes((clips.root / clips.references[0].video).read_bytes() + b"\0\0\0\x08free")
    return path


@pytest.fixture(scope="module")
def sound_file(clips, tmp_path_factory):
    """The audio of a clip, as a WAV file."""
    path = tmp_path_factory.mktemp("sound") / "a song.wav"
    waveform = read_clip(clips.root / clips.references[0].video, FixedRateSampler(frames_per_second=1.0)).waveform
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes((waveform * 32767).astype("<i2").tobytes())
    return path


def choose_example(visitor, number, tab="caption"):
    """Press an example's button and wait for its video."""
    panel = visitor.page.locator(f"#tab-{tab}")
    panel.get_by_role("button", name=f"Example {number}").click()
    visitor.page.locator(f"#{tab}-video video[src$='clip_0000{number - 1}.mp4']").wait_for()


def clear_video(visitor, tab="caption"):
    """Remove the video, if there is one."""
    media = visitor.page.locator(f"#{tab}-video .player :is(video, audio)")
    if media.count():
        visitor.page.locator(f"#{tab}-video").get_by_role("button", name="Clear").click()
        media.wait_for(state="detached")


def upload(visitor, path, tab="caption"):
    """Upload a file by the file chooser."""
    clear_video(visitor, tab)
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator(f"#{tab}-video").get_by_role("button").first.click()
    chooser.value.set_files(path)
    visitor.page.locator(f"#{tab}-video :is(video, audio)").wait_for()


def describe(visitor):
    """Press the button, wait for the complete answer and return its text."""
    start_describing(visitor)
    return wait_for_answer(visitor)


def start_describing(visitor):
    """Press the button; an answer that is shown is marked as the one before."""
    visitor.page.evaluate("document.querySelector('#answer .caption')?.classList.add('before')")
    visitor.page.get_by_role("button", name="Describe", exact=True).click()


def wait_for_answer(visitor):
    """Wait for the complete answer and return its text."""
    caption = visitor.page.locator("#answer .caption:not(.before, .growing)")
    caption.wait_for()
    visitor.page.locator("#status").get_by_text(re.compile(r"\d+ words? · ")).wait_for()
    return caption.inner_text()


def test_a_slow_line(visit, toy, examples):
    """Describe, pressed as soon as an example is, waits for no other event, and none that arrives later clears it.

    Nor does a decision of the server to clear the answer before it.
    """
    visitor, held, is_slow = visit(), [], True
    visitor.page.route("**/gradio_api/run/**", lambda route: held.append(route) if is_slow else route.continue_())
    panel = visitor.page.locator("#tab-caption")
    for number in (1, 2):
        panel.get_by_role("button", name=f"Example {number}").click()
    assert describe(visitor) == toy.caption(examples[1].path).text
    assert held
    is_slow = False
    for route in held:
        with visitor.page.expect_response(route.request.url):
            route.continue_()
    wait_until_idle(visitor)
    assert visitor.page.locator("#answer .caption").inner_text() == toy.caption(examples[1].path).text
    pressed = panel.locator(".examples button[aria-pressed=true]")
    assert pressed.inner_text() == "Example 2"
    visitor.page.unroute("**/gradio_api/run/**")
    held = []

    def hold_decision(route):
        values = route.request.post_data_json["data"]
        if len(values) == 2 and values[0]["path"].endswith("clip_00002.mp4"):  # the file, and the time of its change
            held.append((route, route.fetch()))
        else:
            route.continue_()

    visitor.page.route("**/gradio_api/run/**", hold_decision)
    choose_example(visitor, 3)
    while not held:
        visitor.page.wait_for_timeout(20)
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    expected = toy.caption(examples[2].path).text
    visitor.page.locator("#answer .caption", has_text=expected).wait_for()
    ((route, response),) = held
    with visitor.page.expect_response("**/gradio_api/run/**"):
        route.fulfill(response=response)
    wait_until_idle(visitor)
    assert visitor.page.locator("#answer .caption").all_inner_texts() == [expected]


def test_link_previews_name_salmonn(demo):
    with httpx.Client(base_url=demo.address, trust_env=False, timeout=STEP_SECONDS) as client:
        head = client.get("/").text.partition("<script")[0]
        assert 'content="salmonn"' in head and "Captions of what is seen" in head and "radio" not in head
        assert client.get("/favicon.ico").text.startswith("<svg") and "9a3412" in client.get("/favicon.ico").text


def test_a_sound_file(visitor, toy, sound_file):
    upload(visitor, sound_file)
    assert describe(visitor) == toy.caption(sound_file).text
    assert visitor.page.evaluate("document.querySelector('#caption-video audio').duration") > 1


def test_captions_are_streamed(visit, random_model, examples):
    """The random model never ends an answer."""
    visitor = visit()
    visitor.page.evaluate("""() => {
        window.lengths = [];
        new MutationObserver(() => {
            const caption = document.querySelector('#answer .caption.growing');
            if (caption) window.lengths.push(caption.textContent.length);
        }).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""")
    choose_example(visitor, 1)
    visitor.page.locator("#tab-caption").get_by_label("random").check()
    assert describe(visitor).split() == Captioner.load(random_model).caption(examples[0].path).text.split()
    visitor.page.locator("#answer").get_by_text("The answer was cut off at the token limit").wait_for()
    lengths = visitor.page.evaluate("window.lengths")
    assert lengths == sorted(lengths) and len({length for length in lengths if length}) > 2


def test_an_example_is_scored_and_highlighted(visitor, toy, examples):
    choose_example(visitor, 2)
    describe(visitor)
    findings = visitor.page.locator("#findings")
    findings.get_by_role("region", name="Score").wait_for()
    analysis = CaptionScorer(RuleJudge()).analyze(toy.caption(examples[1].path), examples[1].reference)
    figures = findings.locator(".figures dd").all_inner_texts()
    assert figures[0] == f"{100 * analysis.score.total:.1f} %"
    assert [figure.split()[0] for figure in figures[1:4]] == [
        str(analysis.score.missing), str(analysis.score.incorrect), str(analysis.score.hallucinated),
    ]  # fmt: skip
    assert findings.locator(".chips li").count() == len(analysis.events)
    assert findings.locator("h4.missing + ul li").count() == analysis.score.missing > 0
    assert visitor.page.locator("#answer mark.correct").first.is_visible()
    assert visitor.page.locator("#answer .caption").inner_text() == analysis.caption.text
    # A click on the time of a missing event plays it.
    timestamp = findings.locator("h4.missing + ul .timestamp").first
    seconds = float(timestamp.get_attribute("data-seek"))
    timestamp.click()
    video = visitor.page.locator("#caption-video video")
    visitor.page.wait_for_function(f"document.querySelector('#caption-video video').currentTime > {seconds}")
    assert video.is_visible()


def test_an_upload(visit, toy, demo, long_video):
    """It has no reference until one is typed."""
    visitor = visit()
    before = set(demo.uploads())
    upload(visitor, long_video)
    assert describe(visitor) == toy.caption(long_video).text
    assert visitor.page.locator("#findings").get_by_role("region", name="Score").count() == 0
    (uploaded,) = set(demo.uploads()) - before
    assert uploaded.name.endswith(".mp4")
    visitor.page.get_by_role("button", name="Score against a reference").click()
    visitor.page.locator("#reference textarea").fill("a purple cross blinks\nheard: a low tone is heard")
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#findings").get_by_text("against 2 reference events").wait_for()
    visitor.page.close()
    wait_until(lambda: not uploaded.exists())


def test_a_missing_and_a_broken_file_show_an_error(visitor, tmp_path, toy, examples):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is not a video" * 100)
    clear_video(visitor)
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#answer .error-box").get_by_text("Choose an example").wait_for()
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator("#caption-video").get_by_role("button").first.click()
    chooser.value.set_files(broken)
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    error = visitor.page.locator("#answer .error-box")
    error.get_by_text("is not a video or is damaged").wait_for()
    assert "Traceback" not in error.inner_text() and "/tmp" not in error.inner_text()
    limit = visitor.page.evaluate("window.gradio_config.max_file_size")
    visitor.page.evaluate("window.gradio_config.max_file_size = 1000")
    visitor.page.locator("#caption-video").get_by_role("button", name="Clear").click()
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator("#caption-video").get_by_role("button").first.click()
    chooser.value.set_files(broken)
    visitor.page.locator("#caption-video").get_by_text("“broken.mp4” has 0.0 MiB; the limit is").wait_for()
    choose_example(visitor, 3)
    assert visitor.page.locator(".too-large").count() == 0
    visitor.page.evaluate(f"window.gradio_config.max_file_size = {limit}")
    assert describe(visitor) == toy.caption(examples[2].path).text


def wait_until_idle(visitor):
    """Wait until the page has nothing left to do, twice, as what it has done may cause more."""
    visitor.page.evaluate("""async () => {
        for (let time = 0; time < 2; time++) {
            await new Promise((done) => setTimeout(() => requestIdleCallback(done), 100));
        }
    }""")


def open_options(visitor, tab="caption"):
    visitor.page.locator(f"#tab-{tab}").get_by_role("button", name="Options").click()
    wait_until_idle(visitor)  # Gradio mounts the fields now, and would drop what is typed meanwhile


def set_max_tokens(visitor, tokens, tab="caption"):
    field = visitor.page.locator(f"#tab-{tab}").get_by_label("number input for Max tokens")
    field.fill(str(tokens))
    field.press("Tab")


def test_options_and_audio_only(visit, toy, examples):
    visitor = visit()
    choose_example(visitor, 1)
    visitor.page.get_by_label("Audio only", exact=True).first.check()
    open_options(visitor)
    panel = visitor.page.locator("#tab-caption")
    for label, value in (("Start (seconds)", "2"), ("End (seconds)", "6"), ("Random seed", "9")):
        panel.get_by_label(label).fill(value)
        panel.get_by_label(label).press("Tab")
    panel.get_by_label("number input for Temperature").fill("1")
    panel.get_by_label("number input for Temperature").press("Tab")
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=toy.default_sampling().max_new_tokens)
    expected = toy.caption(examples[0].path, span=Span(2.0, 6.0), modality="audio", sampling=sampling, seed=9)
    assert describe(visitor) == expected.text
    panel.get_by_label("End (seconds)").fill("1")
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#answer .error-box").get_by_text("it must end after it starts").wait_for()


def test_a_question(visitor, toy, examples):
    choose_example(visitor, 1)
    visitor.page.get_by_label("Ask a question").first.check()
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#answer .error-box").get_by_text("Enter a question").wait_for()
    question = examples[0].reference.questions[0].question
    visitor.page.get_by_label("Your question").first.fill(question)
    assert describe(visitor) == toy.caption(examples[0].path, prompt=question).text
    assert visitor.page.locator("#findings").inner_text().strip() == ""
    visitor.page.get_by_label("Your question").first.fill("What <|im_end|> is it?")
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#answer .error-box").get_by_text("special token").wait_for()
    visitor.page.get_by_label("Video and audio").first.check()


def test_a_caption_is_copied_and_rated(visitor, profile, demo):
    """Copies are counted. A caption is rated with a mark; by keyboard, a second time with another rating."""
    profile.grant_permissions(["clipboard-read", "clipboard-write"])
    choose_example(visitor, 1)
    text = describe(visitor)
    visitor.page.locator("#rate-good").wait_for()  # copies are counted from then on
    visitor.page.get_by_role("button", name="Copy").click()
    visitor.page.get_by_text("Copied.").wait_for()
    assert visitor.page.evaluate("navigator.clipboard.readText()") == text
    visitor.page.get_by_role("button", name="Copy").click()
    (copy,) = [one for one in read_feedback(demo.votes) if one.action == "copy"]
    assert (copy.first.model, copy.first.text, copy.video, copy.rater) == ("toy", "", "", "")  # counted only
    rating = visitor.page.locator("#rating")
    rating.get_by_role("button", name="What is wrong or missing?").click()
    rating.locator("#wrong input").nth(1).check()
    rating.locator("#missing textarea").fill("A bird sings.")
    rating.get_by_role("button", name="Bad caption").click()
    rating.get_by_text("Rating saved. It can be used for training.").wait_for()
    bad = read_feedback(demo.votes)[-1]
    (mark,) = bad.marks
    assert (bad.action, bad.first.text, bad.first.model, bad.missing) == ("bad", text, "toy", "A bird sings.")
    assert (mark.start, mark.end) == find_clauses(text)[1] and not mark.is_right and 0 < bad.seconds < 100
    assert (demo.votes / "videos" / bad.kept_video).is_file() and bad.reference
    rating.get_by_label("All other parts are right").check()
    rating.get_by_role("button", name="Good caption").focus()
    visitor.page.keyboard.press("Enter")
    wait_until(lambda: read_feedback(demo.votes)[-1].action == "good")
    good = read_feedback(demo.votes)[-1]
    assert len(good.marks) == len(find_clauses(text)) and sum(not one.is_right for one in good.marks) == 1
    assert good.rater == bad.rater and re.fullmatch("[0-9a-f]{32}", good.rater)
    profile.clear_permissions()


def test_a_description_is_written(visitor, demo, examples):
    """Both without a draft and with one; the server of tests gives them in turn."""
    visitor.page.get_by_role("tab", name="Write").click()
    drafts = []
    for number in (1, 2):
        choose_example(visitor, number, tab="write")
        box = visitor.page.locator("#own-text textarea")
        box.wait_for(state="hidden")
        visitor.page.get_by_role("button", name="Start", exact=True).click()
        box.wait_for()
        drafts.append(box.input_value())
    assert drafts[0] == "" and drafts[1]
    box.fill(examples[1].reference.caption)
    visitor.page.get_by_role("button", name="Done").click()
    status = visitor.page.locator("#writing-status")
    status.get_by_text("it can be used for training").wait_for()
    assert "0.0 %" in status.locator(".figures dd").first.inner_text()
    written = read_feedback(demo.votes)[-1]
    shown = written.first.text.replace("\r\n", "\n").replace("\r", "\n")  # as a text area has it
    assert (written.action, shown) == ("edit", drafts[1])
    assert (written.text, written.total) == (examples[1].reference.caption, 0.0) and 0 < written.seconds < STEP_SECONDS
    assert written.first.total > 0  # the draft has been scored, too
    assert "The draft was by toy." in status.inner_text()


def votes_of(demo):
    return [one for one in read_feedback(demo.votes) if one.action == "vote"]


def start_comparing(visitor, match="toy vs. itself (two samples)"):
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.page.get_by_label(match).check()


def compare(visitor):
    visitor.page.get_by_role("button", name=re.compile("^Compare( again)?$")).click()
    visitor.page.get_by_role("button", name="A is better").wait_for()
    return [visitor.page.locator(f"#{side} .caption").inner_text() for side in ("first", "second")]


def test_a_blind_vote_becomes_a_pair(visitor, demo):
    start_comparing(visitor)
    choose_example(visitor, 1, tab="compare")
    texts = compare(visitor)
    sides = visitor.page.locator("#first, #second")
    assert "temperature" not in " ".join(sides.all_inner_texts())
    visitor.page.get_by_role("button", name="Write a correct caption").click()
    visitor.page.get_by_role("button", name="Start from B").click()
    edit = visitor.page.locator("#edit textarea")
    visitor.page.wait_for_function(f"document.querySelector('#edit textarea').value === {texts[1]!r}")
    edit.fill("A star appears.")
    button = visitor.page.get_by_role("button", name="B is better")
    button.focus()
    visitor.page.keyboard.press("Enter")
    visitor.page.locator("#comparison-status").get_by_text(
        "It will be used for training, with your text as ground truth"
    ).wait_for()
    assert "toy (temperature 0.8)" in visitor.page.locator("#first").inner_text()
    assert "your choice" in visitor.page.locator("#second").inner_text()
    vote = votes_of(demo)[-1]
    assert (vote.choice, vote.text) == ("second", "A star appears.") and 0 < vote.seconds < STEP_SECONDS
    assert [vote.first.text, vote.second.text] == texts and vote.first.total is not None
    assert abs(vote.first.seed - vote.second.seed) == 1 and 0 <= min(vote.first.seed, vote.second.seed) < 1 << 31
    pair = to_comparisons([vote])[0][0]
    assert (pair.chosen, pair.rejected, pair.ground_truth) == (texts[1], texts[0], "A star appears.")
    assert (demo.votes / pair.video).is_file()
    assert re.fullmatch("[0-9a-f]{32}", vote.rater) and pair.rater == vote.rater
    assert visitor.page.evaluate("localStorage.getItem('salmonn-rater')") == vote.rater


def test_votes_by_keyboard(visit, demo):
    visitor = visit()
    start_comparing(visitor)
    page = visitor.page
    page.locator("#tab-compare").get_by_role("button", name="Example 4").click()
    compare(visitor)
    heights = [page.locator(f"#{side} .candidate").bounding_box()["height"] for side in ("first", "second")]
    assert heights[0] == heights[1]
    page.get_by_role("button", name="Write a correct caption").click()
    page.locator("#edit textarea").press_sequentially("n")  # text is no vote
    page.locator("#edit textarea").fill("")
    page.locator("#edit textarea").blur()
    page.keyboard.press("t")
    page.get_by_role("button", name="Next pair").wait_for()
    vote = votes_of(demo)[-1]
    assert (vote.choice, vote.video) == ("tie", "clip_00003.mp4")
    page.keyboard.press("ArrowRight")
    page.locator("#compare-video video[src$='clip_00000.mp4']").wait_for()
    page.get_by_role("button", name="Both bad").wait_for()
    page.keyboard.press("n")
    page.get_by_role("button", name="Next pair").wait_for()
    before, vote = votes_of(demo)[-2:]
    assert (vote.choice, vote.video) == ("both bad", "clip_00000.mp4")
    assert vote.rater == before.rater != ""  # one person's votes have one id


def test_an_upload_is_kept_only_with_consent(visit, demo, long_video):
    visitor = visit()
    start_comparing(visitor)
    upload(visitor, long_video, tab="compare")
    videos = demo.votes / "videos"
    before = set(videos.iterdir())
    compare(visitor)
    visitor.page.get_by_role("button", name="A is better").click()
    visitor.page.locator("#comparison-status").get_by_text("you did not agree to keep the video").wait_for()
    assert set(videos.iterdir()) == before
    compare(visitor)
    visitor.page.get_by_label("Keep this video").check()
    visitor.page.get_by_role("button", name="A is better").click()
    visitor.page.locator("#comparison-status").get_by_text("It will be used for training.").wait_for()
    (new,) = set(videos.iterdir()) - before
    assert new.read_bytes() == long_video.read_bytes()


def test_two_models_and_the_results(visit, demo):
    """Two samples of one model need a temperature.

    Every caption of the toy model is longer than 8 tokens, so that the vote is not used for training.
    """
    visitor = visit()
    start_comparing(visitor)
    choose_example(visitor, 2, tab="compare")
    open_options(visitor, tab="compare")
    temperature = visitor.page.locator("#tab-compare").get_by_label("number input for Temperature")
    temperature.fill("0")
    temperature.press("Tab")
    visitor.page.get_by_role("button", name="Compare", exact=True).click()
    visitor.page.locator("#comparison-status .error-box").get_by_text("are equal at temperature 0").wait_for()
    temperature.fill("0.8")
    temperature.press("Tab")
    visitor.page.get_by_label("toy vs. random").check()
    set_max_tokens(visitor, 8, tab="compare")
    compare(visitor)
    before = len(votes_of(demo))
    visitor.page.get_by_role("button", name="A is better").click()
    visitor.page.locator("#comparison-status").get_by_text("cut off at the token limit").wait_for()
    vote = votes_of(demo)[-1]
    assert {vote.first.model, vote.second.model} == {"toy", "random"}
    assert vote.first.model in visitor.page.locator("#first").inner_text()
    visitor.page.get_by_role("tab", name="Results").click()
    votes = visitor.page.locator("#results .figures div").first
    votes.get_by_text(str(before + 1), exact=True).wait_for()
    results = visitor.page.locator("#results").inner_text()
    assert "random (temperature 0.8) vs. toy (temperature 0.8)" in results
    assert f"wins {100 * (vote.first.model == 'random'):.1f} % {int(vote.first.model == 'random')} of 1" in results
    assert "Do votes and scores agree?" in results
    matrix = visitor.page.get_by_role("table", name="Agreement of rewards and groups")
    cells = [row.locator("td").all_inner_texts() for row in matrix.locator("tbody tr").all()]
    assert cells == [
        ["1: words +1", "80.0 % 70.0 % to 90.0 %", "30.0 % 20.0 % to 40.0 %"],
        ["2: words -1", "25.0 % 15.0 % to 35.0 %", "75.0 % 65.0 % to 85.0 %"],
    ]


def test_a_run_is_shown_and_refreshed(visitor, demo):
    visitor.page.get_by_role("tab", name="Runs").click()
    frame = visitor.page.frame_locator("iframe.run")
    frame.get_by_text("75.0 %").first.wait_for()
    frame.get_by_text("2 steps").wait_for()
    with (demo.run / "steps.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.5}\n')
    visitor.page.get_by_role("button", name="Refresh").click()
    frame.get_by_text("3 steps").wait_for()
    visitor.page.wait_for_function(
        "document.querySelector('iframe.run').offsetHeight >= "
        "document.querySelector('iframe.run').contentDocument.documentElement.scrollHeight"
    )
    # On a narrow screen the frame is higher; back on the wide one it is as before.
    height = visitor.page.locator("iframe.run").bounding_box()["height"]
    visitor.page.set_viewport_size({"width": 390, "height": 900})
    visitor.page.wait_for_function(f"document.querySelector('iframe.run').offsetHeight > {height} + 50")
    visitor.page.set_viewport_size({"width": 1440, "height": 900})
    visitor.page.wait_for_function(f"document.querySelector('iframe.run').offsetHeight < {height} + 50")


def test_examples_are_captioned_in_two_sessions_at_once(visit, visitor, toy, examples):
    one, two = visitor, visit()
    choose_example(one, 1)
    choose_example(two, 4)
    for tab in (one, two):
        start_describing(tab)
    assert wait_for_answer(one) == toy.caption(examples[0].path).text
    assert wait_for_answer(two) == toy.caption(examples[3].path).text


def test_stop(visit):
    """The random model never ends an answer."""
    visitor = visit()
    choose_example(visitor, 1)
    visitor.page.locator("#tab-caption").get_by_label("random").check()
    open_options(visitor)
    set_max_tokens(visitor, 512)
    visitor.page.get_by_role("button", name="Describe", exact=True).click()
    visitor.page.locator("#answer .growing").get_by_text(re.compile(r"\w")).wait_for()
    visitor.page.get_by_role("button", name="Stop").click()
    visitor.page.get_by_text(re.compile(r"words? · random · stopped · ")).wait_for()
    assert visitor.page.locator("#answer .caret").count() == 0
    assert visitor.page.get_by_role("button", name="Describe", exact=True).is_enabled()
    visitor.page.locator("#tab-caption").get_by_label("toy").check()
    describe(visitor)


def test_layout_on_a_phone(visit):
    """In dark colours: tests/webui/test_dataset.py."""
    visitor = visit(viewport=(390, 844))
    assert visitor.width() <= 390
    choose_example(visitor, 1)
    describe(visitor)
    visitor.page.locator("#findings .figures").wait_for()
    assert visitor.width() <= 390
    for tab in ("Compare", "Results", "Runs"):
        visitor.page.get_by_role("tab", name=tab).click()
        if tab == "Compare":
            choose_example(visitor, 2, tab="compare")
            compare(visitor)
            # The captions have been scrolled into view.
            visitor.page.wait_for_function("document.querySelector('#comparison').getBoundingClientRect().top < 400")
        visitor.page.wait_for_function("document.documentElement.scrollWidth <= 390")  # while mounted it is wider
    assert background(visitor) == "rgb(250, 250, 249)"


def background(visitor):
    return visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
