"""Quotations in captions, and which of them are speech."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from salmonn.score.text_spans import WORD

# Quotation marks in pairs. Single ones are distinguished from apostrophes by what surrounds them; a double one that is
# never closed, because the caption was cut off, quotes the rest of its paragraph.
_QUOTATION = re.compile(
    r"“(?P<curly>[^”\n]+)”?|„(?P<low>[^“”\n]+)[“”]?|«(?P<angle>[^»\n]+)»?|「(?P<corner>[^」\n]+)」?"
    r"|『(?P<white>[^』\n]+)』?|(?<![0-9A-Za-z])\"(?P<straight>[^\"\n]+)\"?"
    r"|(?<![\w'’])['‘](?=\S)(?P<single>(?:[^'‘’\n]|(?<=\w)['’](?=\w))+)['’](?!\w)"
)
_SPEECH = (
    r"says?|said|saying|speaks?|speaking|spoken?|speech|tells?|telling|told|asks?|asked|asking|repl(?:y|ies|ied|ying)"
    r"|answer(?:s|ed|ing)?|respon(?:ds?|ded|ding|se)|shout(?:s|ed|ing)?|yell(?:s|ed|ing)?|scream(?:s|ed|ing)?"
    r"|cr(?:y|ies|ied|ying)|whisper(?:s|ed|ing)?|call(?:s|ed|ing)? out|exclaim(?:s|ed|ing)?|announc(?:es?|ed|ing|ement)"
    r"|declar(?:es?|ed|ing)|stat(?:es|ed|ing)|explain(?:s|ed|ing)?|remark(?:s|ed|ing)?|comment(?:s|ed|ing|ary|ator)?"
    r"|mention(?:s|ed|ing)?|add(?:s|ed|ing)|continu(?:es|ed|ing)|greet(?:s|ed|ing)?|introduc(?:es?|ed|ing)"
    r"|murmur(?:s|ed|ing)?|mutter(?:s|ed|ing)?|narrat(?:es?|ed|ing|or|ion)|s[iau]ng|sing(?:s|ing)|lyrics?"
    r"|chant(?:s|ed|ing)?|recit(?:es?|ed|ing)|utter(?:s|ed|ing)?|urg(?:es?|ed|ing)|warn(?:s|ed|ing)?|insist(?:s|ed|ing)?"
    r"|jok(?:es?|ed|ing)|wonder(?:s|ed|ing)?|inquir(?:es?|ed|ing)|repeat(?:s|ed|ing)?|conclud(?:es?|ed|ing)"
    r"|instruct(?:s|ed|ing)?|confirm(?:s|ed|ing)?|deliver(?:s|ed|ing)?|voices?|voice-?overs?|dialogues?|monologues?"
    r"|conversation|aloud|hear[ds]?|audio|speaker|exchange(?:s|d)?"
)
_SHOWN_NOUN = (
    r"texts?|signs?|titles?|captions?|subtitles?|labels?|logos?|screens?|overlays?|banners?|posters?|headlines?"
    r"|watermarks?|buttons?|graphics?|letter(?:s|ing)|notes?|cards?|shirts?|letters|words"
)
_SHOWN = (
    rf"(?:{_SHOWN_NOUN})(?:\W+(?:that|which|also|clearly|simply))*\W+(?:says?|said|saying)|{_SHOWN_NOUN}"
    r"|reads?|reading|writ(?:es?|ten|ing)|wrote|titled|labell?ed|labell?ing|captioned|display(?:s|ed|ing)?"
    r"|print(?:s|ed)|spell(?:s|ed|ing)|named|called|known as"
)
# "called out" is tried before "called", and what a sign says before what is said.
_CUE = re.compile(
    rf"\b(?:(?P<shown>{_SHOWN}(?! out))|(?P<speech>{_SPEECH}))\b|(?P<shown_zh>写|寫|字幕|标题|標題|显示|顯示|文字)"
    r"|(?P<speech_zh>[说說问問喊叫讲講唱]|回答|表示|道[:：,，]?$)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？](?:\s|$)|\n")
_AFTER_WORDS = 8  # after a quotation, within which a cue belongs to it


class Quotation(NamedTuple):
    """Start and end of a quotation with its marks, in characters, and its text without them."""

    start: int
    end: int
    text: str


def quoted_speech(text: str) -> list[str]:
    """Return the quotations of a caption that are speech, in order.

    The cue nearest before a quotation, in its sentence, decides; else a colon before it, which means speech; else a cue
    shortly after it. Speech verbs and nouns ("says", "voice") are cues of speech; "reads", "sign", "titled" and the
    like of text that is seen. Without any, a quotation is speech if it is next to one that is.
    """
    quotations = list(find_quotations(text))
    verdicts: list[bool | None] = []
    follows: list[bool] = []  # whether nothing but a sentence end or "and" comes between a quotation and its previous
    end = 0
    ends = [*(one.start for one in quotations), len(text)][1:]
    for quotation, following in zip(quotations, ends, strict=True):
        *earlier, before = _SENTENCE_END.split(text[end : quotation.start])
        after = " ".join(_SENTENCE_END.split(text[quotation.end : following])[0].split()[:_AFTER_WORDS])
        cues = [_is_speech_cue(cue) for cue in _CUE.finditer(before)][-1:]
        cues = cues or [True] * before.rstrip().endswith((":", "："))
        cues = cues or [_is_speech_cue(cue) for cue in _CUE.finditer(after)][:1]
        verdicts.append(cues[0] if cues else None)
        follows.append(end > 0 and len(earlier) <= 1 and len(WORD.findall(before)) <= 2)
        end = quotation.end
    forwards = [(place, place - 1) for place in range(1, len(quotations))]
    for place, other in [*forwards, *((other, place) for place, other in reversed(forwards))]:
        if verdicts[place] is None and follows[max(place, other)]:
            verdicts[place] = verdicts[other]
    return [quotation.text for quotation, is_speech in zip(quotations, verdicts, strict=True) if is_speech]


def find_quotations(text: str) -> Iterator[Quotation]:
    """Yield the quotations of a text that have words, spoken or not."""
    for match in _QUOTATION.finditer(text):
        content = next(group for group in match.groups() if group is not None)
        if WORD.search(content):
            yield Quotation(match.start(), match.end(), content)


def _is_speech_cue(cue: re.Match[str]) -> bool:
    return bool(cue["speech"] or cue["speech_zh"])
