"""Long strings of a JSON body become files, however the body is cut into parts."""

import base64
import json
import random

import pytest

from salmonn.serve import body as body_module
from salmonn.serve.body import BodyScanner
from salmonn.serve.fetch import SourceError, TooLargeError

DATA = random.Random(0).randbytes(3000)
ENCODED = base64.b64encode(DATA).decode()
TEXTS = {
    "é\n": ["", '"', "\\", 'a"b\\c\u20ac', "\U0001f600", 'x: "y", {z}', "\\u0041"],
    "n": [1, {"a": None}, "\\\\"],
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(body_module, "LONG_STRING_BYTES", 100)
    monkeypatch.setattr(body_module, "MAX_TEXT_BYTES", 600)


def scan(text: str | bytes, folder, *, sizes=(10**6,), max_bytes=10**6):
    scanner = BodyScanner(lambda: folder, max_bytes=max_bytes)
    text, number = text.encode() if isinstance(text, str) else text, 0
    while text:
        size = sizes[number % len(sizes)]
        scanner.feed(text[:size])
        text, number = text[size:], number + 1
    return scanner.finish()


@pytest.mark.parametrize("sizes", [(10**6,), (1,), (2,), (7, 1, 3), (101,), (4096, 5)])
@pytest.mark.parametrize(
    "written",
    [
        json.dumps(ENCODED),
        json.dumps(f"data:video/mp4;base64,{ENCODED}"),
        json.dumps(ENCODED).replace("/", "\\/"),  # as PHP does
        json.dumps("\r\n".join(ENCODED[first : first + 76] for first in range(0, len(ENCODED), 76))),
        json.dumps(ENCODED).replace("A", "\\u0041"),
        json.dumps(ENCODED).replace("A", "%41").rstrip('="') + '"',
    ],
)
def test_long_strings_become_files(tmp_path, sizes, written):
    text = json.dumps(TEXTS)[:-1] + f', "one": {written}, "two":[{written} ]}}'
    body = scan(text, tmp_path, sizes=sizes)
    value = json.loads(body.text)
    files = [body.files[value.pop("one")], *[body.files[one] for one in value.pop("two")]]
    assert value == TEXTS
    assert [file.path.read_bytes() for file in files] == [DATA, DATA] and files[0].path != files[1].path
    assert [(file.num_bytes, file.error) for file in files] == [(3000, None)] * 2


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_other_text_is_unchanged(tmp_path, ensure_ascii):
    text = json.dumps(TEXTS, ensure_ascii=ensure_ascii).encode()
    for broken in (text, text[:-5], text + b'"', text + b'"\\u12', b'"' * 9, b"\xff\x00"):
        for sizes in ((1,), (5, 2)):
            body = scan(broken, tmp_path, sizes=sizes)
            assert body.text == broken and not body.files
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "string", ["x y" * 100, "é" * 300, "A" * 300 + "!", "data:video/mp4," + "A" * 300, "A" * 301, 'AA\\"' * 100]
)
def test_strings_that_are_no_base64(tmp_path, string):
    """An error of its file, and not of the body, which may have another one before it."""
    body = scan(f'{{"a": "{string}", "b": 1}}', tmp_path, sizes=(64,))
    value = json.loads(body.text)
    assert isinstance(body.files[value["a"]].error, SourceError) and value["b"] == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_escape_sequence_ends(tmp_path):
    """What follows it is decoded to disk all the same, and not kept in memory."""
    scanner = BodyScanner(lambda: tmp_path, max_bytes=10**6)
    for part in (b'{"a": "\\u12', b'", "b": "', ENCODED.encode(), b'"}'):
        scanner.feed(part)
    body = scanner.finish()
    (reference,) = body.files
    assert body.text == b'{"a": "\\u12", "b": "%b"}' % reference.encode()
    assert body.files[reference].path.read_bytes() == DATA


def test_limits(tmp_path):
    with pytest.raises(TooLargeError, match="the file is larger than the maximum"):
        scan(json.dumps([ENCODED]), tmp_path, max_bytes=2999)
    with pytest.raises(TooLargeError, match="more than 600 bytes in addition to its file"):
        scan(json.dumps(["x" * 99] * 7), tmp_path)
    assert scan(json.dumps([ENCODED, "x" * 99] * 3), tmp_path, sizes=(50,)).files
    (tmp_path / "none").mkdir()
    assert not scan('["' + ENCODED, tmp_path / "none").files  # a string without an end
    assert not list((tmp_path / "none").iterdir())


def test_a_long_string_that_is_no_file_is_found(tmp_path):
    text = json.dumps({"messages": [{"content": [{"url": ENCODED}, {"text": "a " * 99}]}], "user": "me"})
    body = scan(text, tmp_path)
    url = json.loads(body.text)["messages"][0]["content"][0]["url"]
    with pytest.raises(TooLargeError, match=r"^messages\[0\]\.content\[1\]\.text: the string is too long"):
        body.check_references(url)
    body = scan(json.dumps({"a": {ENCODED: 1}}), tmp_path)
    with pytest.raises(TooLargeError, match=r"^a: the string is too long"):
        body.check_references("")
    forged = json.dumps([next(iter(body.files))])
    assert not scan(forged, tmp_path).files
