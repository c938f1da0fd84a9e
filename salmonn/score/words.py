"""What a word is, in any language."""

import re

# Written without spaces between words: each character counts as one. Chinese, Japanese, Thai, Lao, Burmese, Khmer.
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Marks that stand after their letter, as accents of decomposed text do.
_MARKS = "\u0300-\u036f"
_LETTER = rf"[^\W_{_SINGLE}][{_MARKS}]*"
WORD = re.compile(rf"(?:{_LETTER})+(?:['\u2019\-](?:{_LETTER})+)*|[{_SINGLE}]")
ARTICLES = frozenset(("a", "an", "the"))
