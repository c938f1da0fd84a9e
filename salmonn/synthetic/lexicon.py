"""The vocabulary of the synthetic world: the phrasings that captions are written in, and the words they are read by.

Captions are written from the first half and parsed by the second, which also knows synonyms and inflections that no
caption of ours uses. In templates `{a}` is the object with "a", `{the}` the object with "the" (or "it"). The first
template of each kind is the canonical one, which event lists use.
"""

import re

# Phrasings. Colours are RGB, directions (x, y) from the top left.
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 185, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FORMS = {
    "appear": ("{a} appears", "{a} shows up", "{a} comes into view", "{a} pops up", "{a} can now be seen"),
    "leave": ("{the} disappears", "{the} vanishes", "{the} goes away", "{the} is gone", "{the} leaves the picture"),
    "blink": ("{the} blinks", "{the} flashes on and off", "{the} flickers", "{the} blinks a few times"),
    "change": (
        "{the} turns {colour}",
        "{the} becomes {colour}",
        "{the} changes to {colour}",
        "{the} changes its colour to {colour}",
    ),
}
MOVE = {
    "left": ("{the} moves to the left", "{the} slides to the left", "{the} moves left", "{the} drifts leftwards"),
    "right": ("{the} moves to the right", "{the} slides to the right", "{the} moves right", "{the} drifts rightwards"),
    "up": ("{the} moves up", "{the} slides up", "{the} rises to the top", "{the} drifts upwards"),
    "down": ("{the} moves down", "{the} slides down", "{the} sinks to the bottom", "{the} drifts downwards"),
}
# Noun phrases of each kind of sound; each fits each template of HEARD. Plural ones ("repeated beeps") are written with
# HEARD_PLURAL, whose verbs do not inflect.
SOUNDS = {
    "low tone": ("a low tone", "a deep tone", "a low-pitched tone"),
    "high tone": ("a high tone", "a high-pitched tone", "a shrill tone"),
    "rising sweep": ("a rising sweep", "a rising sound", "a sound that climbs in pitch"),
    "falling sweep": ("a falling sweep", "a falling sound", "a sound that drops in pitch"),
    "beeps": ("a series of beeps", "a row of beeps", "repeated beeps"),
    "clicks": ("a series of clicks", "a row of clicks", "repeated clicks"),
    "noise": ("a burst of noise", "a hissing noise", "a rush of static"),
}
HEARD = ("{sound} is heard", "{sound} plays", "{sound} can be heard", "we hear {sound}", "there is {sound}")
HEARD_PLURAL = ("{sound} can be heard", "we hear {sound}")


def fill_template(template: str, *, colour: str, shape: str, value: str = "", pronoun: str = "") -> str:
    """Fill in a visual template.

    Args:
        template: one of `FORMS` or `MOVE`.
        colour, shape: the object.
        value: new colour of a change.
        pronoun: word used instead of "the" and the object.
    """
    article = "an" if colour[:1] in "aeiou" else "a"
    the = pronoun or f"the {colour} {shape}"
    return template.format(a=f"{article} {colour} {shape}", the=the, colour=value)


def canonical_clause(kind: str, *, colour: str = "", shape: str = "", value: str = "") -> str:
    """Return the canonical clause of an event; `value` is the direction, new colour or kind of sound."""
    if kind == "sound":
        return HEARD[0].format(sound=SOUNDS[value][0])
    template = (MOVE[value] if kind == "move" else FORMS[kind])[0]
    return fill_template(template, colour=colour, shape=shape, value=value)


# Reading: canonical word -> synonyms.
_COLOUR_WORDS = {
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
_SHAPE_WORDS = {
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
# Verbs and sound nouns are in their base form; `_inflect` adds the regular inflections.
_VERBS = {
    "appear": "reappear emerge arrive enter materialise materialize",
    "leave": "disappear vanish exit gone depart fade remove",
    "blink": "flash flicker pulse pulsate twinkle",
    "change": "turn become became",
    "move": "slide slid drift glide shift travel travelled travelling float go went head fly flies flew roll run "
    "running ran jump",
}
# Verbs of motion with a direction; in a clause about a sound they describe its pitch.
_CLIMBS = {
    "up": "rise rose ascend climb increase",
    "down": "sink sank fall fell drop dropped dropping descend decrease",
}
_SOUND_WORDS = {
    "beeps": "beep bleep",
    "clicks": "click tick",
    "noise": "hiss static crackle",
    "low": "deep bass",
    "high": "shrill",
    "tone": "sound sweep note pitch hum glissando",
}
_DIRECTION_WORDS = {
    "left": "leftward leftwards",
    "right": "rightward rightwards",
    "up": "upward upwards top upper",
    "down": "downward downwards bottom lower",
}
# Tag of the clause parser -> function words.
_FUNCTION_WORDS = {
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

# Idioms: words with a meaning only together. Each is replaced by one word of the tables above, or "" if meaningless.
_PLACE = r"(?:the |our )?(?:view|sight|picture|frame|screen|image|scene|clip|video)"
_IDIOMS = (
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
_IDIOM = re.compile("|".join(rf"(?P<p{index}>\b(?:{pattern}))" for index, (pattern, _) in enumerate(_IDIOMS)))
_IDIOM_WORDS = {f"p{index}": word for index, (_, word) in enumerate(_IDIOMS)}


def _inflect(word: str) -> tuple[str, ...]:
    stem = word.removesuffix("e")
    return word, word + "s", word + "es", stem + "ed", stem + "ing"


def _entries(tag: str, table: dict[str, str], *, inflect: bool = False) -> dict[str, tuple[str, str]]:
    """Map each form of each word of a table to its tag and canonical word."""
    return {
        form: (tag, value)
        for value, synonyms in table.items()
        for word in (*synonyms.split(), value)
        for form in (_inflect(word) if inflect else (word, word + "s"))
    }


# Word -> (tag, canonical word).
LEXICON: dict[str, tuple[str, str]] = {
    **{word: (tag, "") for tag, words in _FUNCTION_WORDS.items() for word in words.split()},
    **_entries("direction", _DIRECTION_WORDS),
    **_entries("sound", _SOUND_WORDS, inflect=True),
    **_entries("verb", _VERBS, inflect=True),
    **_entries("colour", _COLOUR_WORDS),
    **{word: entry for word, entry in _entries("climb", _CLIMBS, inflect=True).items() if word not in _CLIMBS},
    **_entries("shape", _SHAPE_WORDS),
    "boxes": ("shape", "square"),
    "crosses": ("shape", "cross"),
}
# Words that say nothing about what happens.
FILLER_WORDS = frozenset(_FILLERS.split())


def replace_idioms(text: str) -> str:
    """Replace each idiom of a lower-case text by the word of the lexicon that it stands for."""
    return _IDIOM.sub(lambda match: f" {_IDIOM_WORDS[match.lastgroup or '']} ", text)
