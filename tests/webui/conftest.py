"""A real `salmonn demo`, and browsers that must not access anything else."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import BrowserContext, ConsoleMessage, Page

from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.files import read_records, write_json, write_records, write_text
from salmonn.model.fingerprint import hash_model
from salmonn.preference.agreement import OrderedVotes
from salmonn.preference.ideal_point import IdealPointConfig, IdealPointHead
from salmonn.preference.mixture import RATERS_NAME, MixtureHead, PrototypeInfo, Rater
from salmonn.preference.rating import Rating
from salmonn.preference.reward_model import RewardInfo, head_width, save_reward_model
from salmonn.records import Caption, Failure, Reference
from salmonn.score.metrics import Rates
from salmonn.train.data import ClipSet
from salmonn.webui.session import ExampleClip
from tests.launch import forked
from tests.limits import STEP_SECONDS
from tests.score.browser import start_profile

AGREEMENT = ((0.8, 0.3), (0.25, 0.75))  # of the rewards of `toy_reward` and its groups of raters
SALMONN = Path(sys.executable).with_name("salmonn")
# `salmonn`, with drafts in turn: none, and one by the toy model.
WITH_DRAFTS_IN_TURN = """
from itertools import cycle
from types import SimpleNamespace
import salmonn.webui.write_tab
from salmonn.cli.main import main
drafts = cycle(["", "toy"])
salmonn.webui.write_tab.random = SimpleNamespace(
    SystemRandom=lambda: SimpleNamespace(choice=lambda models: next(drafts))
)
main()
"""


@dataclass
class Demo:
    """A running web UI.

    Args:
        process: the process.
        address: URL.
        votes: folder of votes.
        run: folder of the training run that it shows.
        folder: folder of temporary files.
        proxy: listening socket, as the only way to the network.
    """

    process: subprocess.Popen
    address: str
    votes: Path
    run: Path
    folder: Path
    proxy: socket.socket

    def uploads(self) -> list[Path]:
        """Return the uploaded files on disk."""
        return [path for path in self.folder.glob("*/uploads/**/*") if path.is_file()]


def start_demo(folder: Path, *flags: object, command: Sequence[object] = (SALMONN,)) -> Demo:
    """Start the command and wait for its URL."""
    (folder / "tmp").mkdir(parents=True)
    run = folder / "run"
    write_text(run / "steps.jsonl", '{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    write_json(run / "summary.json", asdict(Rates(0.5, 0.25, 0.75, 0.125, clips=3)))
    command = [*command, "demo", "--port", "0", "--votes", folder / "votes", "--run", run]
    proxy = socket.create_server(("127.0.0.1", 0))
    names = dict.fromkeys(["http_proxy", "https_proxy"], f"http://127.0.0.1:{proxy.getsockname()[1]}")
    env = (
        os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), "no_proxy": "127.0.0.1,localhost"} | names
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(forked(*command, *flags), stderr=log, stdout=log, env=env)
    started = time.monotonic()
    while "web UI running at " not in (log := (folder / "log").read_text()):
        if process.poll() is not None or time.monotonic() - started > STEP_SECONDS:
            process.kill()
            raise AssertionError(f"the web UI did not start:\n{log}")
        time.sleep(0.1)
    address = log.split("web UI running at ")[1].split()[0]
    return Demo(process, address, folder / "votes", run, folder / "tmp", proxy)


def write_dataset(folder: Path, clips: ClipSet) -> Path:
    """Write captions of the five clips, 30 of them, with rewards and a failure; return the captions file."""
    videos = [one.video for one in clips.references]
    captions = [Caption(videos[number % 5], f"A red circle, number {number}.", sample=number) for number in range(30)]
    captions[1] = replace(captions[1], text="A dog barks & <b>howls</b>.", finished=False)
    captions[2] = replace(captions[2], text="A long one: " + "and a bell rings then " * 9, warnings=("lost 0.1 s",))
    captions[3] = replace(captions[3], text="Rain.")
    captions[4] = replace(captions[4], video="../gone.mp4")
    write_records(folder / "captions.jsonl", captions)
    write_records(folder / "captions.failed.jsonl", [Failure("broken.mp4", "broken.mp4: is damaged")])
    ratings = [Rating(one.video, {"reward": float(one.sample)}, {"reward": 1.0}, one.sample) for one in captions]
    write_records(folder / "rewards.jsonl", ratings)
    return folder / "captions.jsonl"


@pytest.fixture(scope="package")
def toy_reward(tmp_path_factory, toy) -> Path:
    """A reward model of the toy model: prototype 1, with 3 of 4 parts of the mean rater, rewards tokens, 2 brevity."""
    folder = tmp_path_factory.mktemp("toy_reward")
    config, width = IdealPointConfig(hidden=1), head_width(toy, "rich")
    head = IdealPointHead(width, prompt_width := head_width(toy, "last"), num_prototypes=2, config=config)
    # Of the six figures at the end of the states, the fifth is the number of tokens.
    for layer, weight in ((0, torch.eye(width)[-2:-1]), (3, torch.tensor([[1.0], [-1.0]]))):
        head.project[layer].weight.data, head.project[layer].bias.data = weight, torch.zeros(len(weight))
    sizes = (0.75, 0.25)
    agreement = tuple(tuple(OrderedVotes(40, share, share - 0.1, share + 0.1) for share in row) for row in AGREEMENT)
    described = ("words +1", "words -1")
    prototypes = PrototypeInfo("score", config.dim, 1, prompt_width, sizes, 0.8, described, agreement=agreement)
    info = RewardInfo("ideal-point", "rich", "toy", hash_model(toy.network), prototypes=prototypes)
    write_records(folder / RATERS_NAME, [Rater("a" * 32, sizes, num_votes=3)])
    save_reward_model(folder, MixtureHead(head, torch.tensor(sizes)), info)
    return folder


@pytest.fixture(scope="package")
def demo(tmp_path_factory, random_model, clips, toy_reward) -> Iterator[Demo]:
    """A web UI with the toy model and a random one that never ends an answer; at the end it deletes all its files.

    Its captions file is the one of `write_dataset`, beside its feedback; its reward model is `toy_reward`.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "set").mkdir()
    dataset = write_dataset(folder / "set", clips)
    flags = ("--dataset", dataset, "--dataset-root", clips.root, "--rewards", dataset.with_name("rewards.jsonl"))
    command = (sys.executable, "-c", WITH_DRAFTS_IN_TURN)
    models = ("--other_model", random_model, "--reward-model", toy_reward)
    demo = start_demo(folder, *models, *flags, command=command)
    yield demo
    demo.process.send_signal(signal.SIGTERM)
    assert demo.process.wait(STEP_SECONDS) == 0
    assert not list(demo.folder.glob("salmonn-*"))


@pytest.fixture(scope="session")
def profile_folder(tmp_path_factory) -> Path:
    """Folder of the browser's profile, which keeps compiled scripts from one module to the next."""
    return tmp_path_factory.mktemp("profile")


# Not for longer than a module: while Playwright runs, no other test can start an event loop or a browser.
@pytest.fixture(scope="module")
def profile(profile_folder) -> Iterator[BrowserContext]:
    """The profile of a browser with a camera and a microphone that need no permission."""
    options = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with start_profile(profile_folder, *options) as profile:
        yield profile


@pytest.fixture(scope="package")
def toy() -> Captioner:
    """The default model of the web UI."""
    return Captioner.load(SHIPPED_MODEL)


@pytest.fixture(scope="package")
def examples(demo) -> list[ExampleClip]:
    """The example clips of the web UI."""
    (folder,) = demo.folder.glob("*/examples")
    references = read_records(folder / "clips.jsonl", Reference)
    paths = [folder / one.video for one in references]
    return [ExampleClip(path, path.with_suffix(".png"), one) for path, one in zip(paths, references, strict=True)]


class Visitor:
    """A user's browser tab.

    Args:
        page: page of the browser.
        other_urls: requested URLs of other servers.
        errors: errors in the browser's console.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.other_urls: list[str] = []
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._log_error)
        self.page.on("request", lambda request: self._check_url(request.url, address))
        self.page.goto(address)
        self.page.get_by_role("button", name="Describe", exact=True).wait_for()

    def _check_url(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.other_urls.append(url)

    def _log_error(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location['url']}")

    def width(self) -> int:
        """Return the scrollable width in pixels."""
        return self.page.evaluate("document.documentElement.scrollWidth")

    def check(self) -> None:
        """Assert that no other URLs were requested, and that there were no errors."""
        assert self.other_urls == [] and self.errors == []

    def close(self) -> None:
        """Close the tab, and forget what the browser has stored."""
        if not self.page.is_closed():
            self.page.evaluate("localStorage.clear()")
            self.page.close()


def open_tab(profile, demo, *, viewport=(1440, 900), color_scheme="light") -> Visitor:
    page = profile.new_page()
    page.set_viewport_size(dict(zip(("width", "height"), viewport, strict=True)))
    page.emulate_media(color_scheme=color_scheme)
    return Visitor(page, demo.address)


@pytest.fixture
def visit(profile, demo):
    """Open the web UI in a new browser tab; it must not request other URLs or cause errors."""
    visitors = []

    def open_page(**options) -> Visitor:
        visitors.append(open_tab(profile, demo, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.check()
        visitor.close()


@pytest.fixture(scope="module")
def kept() -> list[Visitor]:
    """The browser tab that the tests of a module share."""
    return []


@pytest.fixture
def visitor(request, profile, demo, kept) -> Iterator[Visitor]:
    """A browser tab that tests use one after the other, as loading the page takes seconds; after a failure, a new one.

    A test leaves it as it was, except for the choice of a video and the answers.
    """
    num_failed = request.session.testsfailed
    if not kept:
        kept.append(open_tab(profile, demo))
    kept[0].page.get_by_role("tab", name="Caption").click()
    yield kept[0]
    if request.session.testsfailed > num_failed or kept[0].other_urls or kept[0].errors:
        visitor = kept.pop()
        visitor.close()
        visitor.check()
