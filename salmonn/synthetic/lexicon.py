"""The words that captions are read by: colours, shapes, verbs, directions and sounds, with synonyms and inflections."""

import re

_COLOURS = {
    "red": "crimson scarlet reddish",
    "green": "greenish lime emerald",
    "blue": "bluish azure navy",
    "yellow": "yellowish golden gold",
    "purple": "violet purplish lilac lavender",
    "orange": "amber",
    "white": "whitish",
    "pink": "",
    "black": "",
    "grey": "gray",
    "brown": "",
    "cyan": "turquoise teal",
    "magenta": "",
}
_SHAPES = {
    "circle": "disc disk dot ball",
    "square": "box block",
    "triangle": "",
    "star": "",
    "cross": "plus",
    "rectangle": "",
    "diamond": "",
    "oval": "ellipse",
    "hexagon": "",
    "pentagon": "",
    "heart": "",
    "arrow": "",
}
# Verbs and nouns of sound stand here in their plain form; `_forms` adds the regular inflections.
_VERBS = {
    "appear": "reappear emerge arrive enter materialise materialize",
    "leave": "disappear vanish exit gone depart fade remove",
    "blink": "flash flicker pulse pulsate twinkle",
    "change": "turn become became",
    "move": "slide slid drift glide shift travel travelled travelling float go went head fly flies flew roll run "
    "running ran jump",
}
# Verbs that move and say where to; in a clause on a sound they tell how its pitch goes.
_CLIMBS = {
    "up": "rise rose ascend climb increase",
    "down": "sink sank fall fell drop dropped dropping descend decrease",
}
_SOUNDS = {
    "beeps": "beep bleep",
    "clicks": "click tick",
    "noise": "hiss static crackle",
    "low": "deep bass",
    "high": "shrill",
    "tone": "sound sweep note pitch hum glissando",
}
_DIRECTIONS = {
    "left": "leftward leftwards",
    "right": "rightward rightwards",
    "up": "upward upwards top upper",
    "down": "downward downwards bottom lower",
}
_OTHER = {
    "one": "one ones",
    "any": "shape shapes object objects thing things figure figures",
    "it": "it",
    "they": "they both them",
    "a": "a an another",
    "see": "see seen sees visible shown show shows displayed there present",
    "hear": "hear heard hears audible play plays played playing",
    "no": "no not never without nothing none cannot",
    "from": "from",
    "at": "on in at near",
    "that": "that which who",
}
_FILLERS = """
the this these those is are was were be been being has have had having do does can could may will would we
you i he she and then next after before finally first firstly second secondly third last lastly later again
once more twice times few time same meanwhile now soon also too still while as when until but so start
starts started starting begin begins began beginning end ends ended ending stop stops stopped stopping
finish finishes keeps continues continue remain remains stays middle of for to by into onto over across
through out off toward towards with within during from about around some all any other each every only just
quickly slowly suddenly briefly gradually shortly immediately eventually steadily smoothly repeatedly series
row burst rush repeated pitched frequency clip video scene screen picture frame image view background side
sides corner centre center edge place position direction way colour color coloured colored seconds moment
short long brief quick slow happens happen occurs nothing else what where here follows followed back forth
come comes came coming get gets got getting make makes making two three four five together its itself their
against
"""

# Words that mean something only together. Each becomes one word of the tables above, or "" where it says nothing.
_PLACE = r"(?:the |our )?(?:view|sight|picture|frame|screen|image|scene|clip|video)"
_PHRASES = (
    (r"(?:(?:turn|switch|go|flash|blink)\w* )?on and off", "blinks"),
    (r"(?:is |are )?(?:no longer|not) (?:visible|seen|there|present|shown)(?: any ?more)?", "disappears"),
    (r"(?:go(?:es|ne|ing)?|went|fad\w+) (?:away|out)|has left", "disappears"),
    (rf"(?:leaves?|leaving|left|out of) {_PLACE}", "disappears"),
    (r"(?:shows?|showed|shown|showing|pop(?:s|ped|ping)?|com(?:es?|ing)|came|turn(?:s|ed)?) up", "appears"),
    (rf"(?:mov|slid|drift|com|fl|glid|cam|pop|fad)\w* in(?:to {_PLACE})?", "appears"),
    (r"appear(?:s|ed)? to (?!the\b|our\b)|nothing (?:else )?(?:happens|is (?:seen|heard|shown))|in pitch|as well", ""),
    (r"cross(?:es|ed|ing) (?=the\b|over\b)|mak\w+ (?:its|their) way", "moves "),
    (r"(?:goes|went) (?=(?:red|green|blue|yellow|purple|violet|orange|white)\b)", "becomes "),
    (r"(?:is|are) now (?!heard|seen|visible|gone)", "becomes "),
    (r"(?:dark|black|gr[ae]y|plain|blank|empty)(?: \w+)? (?:background|screen)", ""),
    (r"one after (?:another|the other)|after (?:that|this)|on ?screen|at once", ""),
)
_PHRASE = re.compile("|".join(rf"(?P<p{index}>\b(?:{pattern}))" for index, (pattern, _) in enumerate(_PHRASES)))
_PHRASE_WORDS = {f"p{index}": word for index, (_, word) in enumerate(_PHRASES)}


def _forms(word: str) -> tuple[str, ...]:
    stem = word.removesuffix("e")
    return word, word + "s", word + "es", stem + "ed", stem + "ing"


def _words(tag: str, table: dict[str, str], *, inflect: bool = False) -> dict[str, tuple[str, str]]:
    return {
        form: (tag, value)
        for value, words in table.items()
        for word in (*words.split(), value)
        for form in (_forms(word) if inflect else (word, word + "s"))
    }


# Each word's tag (colour, verb, ...) and what it stands for.
LEXICON: dict[str, tuple[str, str]] = {
    **{word: (tag, "") for tag, words in _OTHER.items() for word in words.split()},
    **_words("direction", _DIRECTIONS),
    **_words("sound", _SOUNDS, inflect=True),
    **_words("verb", _VERBS, inflect=True),
    **_words("colour", _COLOURS),
    **{word: ("climb", value) for word, (_, value) in _words("", _CLIMBS, inflect=True).items() if word not in _CLIMBS},
    **_words("shape", _SHAPES),
    "boxes": ("shape", "square"),
    "crosses": ("shape", "cross"),
}
# Words that say nothing of what happens.
FILLER_WORDS = frozenset(_FILLERS.split())


def join_phrases(text: str) -> str:
    """Put one word of the lexicon in the place of words that mean something only together; `text` in lower case."""
    return _PHRASE.sub(lambda match: f" {_PHRASE_WORDS[match.lastgroup or '']} ", text)
