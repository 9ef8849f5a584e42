"""Names in texts: when two are the same, and where a text names a concept, whatever its case,
accents, hyphens and script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

ARTICLES = ("a", "an", "the")
BLANK = "\u200b"  # zero width: parts words in scripts that have no blanks
UNSEEN = (
    "\u115f\u1160\u3164\uffa0"  # Hangul fillers, which are letters; the others are of category Cf
)
LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "’": "'", "‘": "'"}
)
"""letters and quotes that no normal form takes apart"""
# What parts the words of a name: blanks, hyphens, dashes, underscores, the middle dots of katakana.
PARTING = r"[\s_\-\u00b7\u2010-\u2015\u2212\u30fb\u200b]"
# What comparing leaves out: accents, vowel signs of Hebrew and Arabic, variants of emoji. Marks of
# other scripts are as good as letters.
ACCENTS = re.compile(
    r"[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff"
    r"\ufe00-\ufe0f\ufe20-\ufe2f]"
)
# No blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
UNPARTED = re.compile(
    r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
HANGUL = re.compile(r"[\u1100-\u11ff\uac00-\ud7a3]")  # blanks, but particles stick to the words
PLURALS = {
    "man": "men",
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ctus": "cti",
    "y": "ies",
    "f": "ves",
    "fe": "ves",
}
"""end of a name -> its plural's, beside those in s and es"""


def fold(text: str) -> str:
    """`text` for comparing: without case, accents, full-width forms and what cannot be seen."""
    return "".join(map(_folded, unicodedata.normalize("NFKC", text)))


def same(name: str) -> str:
    """A key of the name: equal for two that differ in `fold`, blanks, hyphens or a leading
    article."""
    words = re.sub(PARTING, " ", fold(name)).split()
    return "".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words) or name


class Names:
    """Looks for names in texts.

    A name is found as a whole word or words, whatever its case, accents, blanks, hyphens and
    underscores, also in the plural: "chain saw" in "two chainsaws", but "cat" not in "a cathedral".
    Chinese, Japanese and Thai put no blanks between words: there it is found wherever it stands.
    """

    def __init__(self, names: Iterable[str]) -> None:
        ordered = sorted(set(names), key=len, reverse=True)  # longest first: it covers others
        self._patterns = {name: _pattern(name) for name in ordered}

    def found(self, text: str) -> list[str]:
        """Those of the names that stand in the text."""
        folded = _seen(text)[0]
        return [name for name, pattern in self._patterns.items() if _spans(pattern, folded)]

    def replaced(self, text: str, by: Mapping[str, str]) -> str:
        """The text with what stands in `by` for a name in the place of each name.

        Args:
            text: comes back in Unicode's composed form (NFC).
            by: name -> its substitute.
        """
        spans = list[tuple[int, int, str]]()
        for name, first, last in self._places(text):
            if all(last <= left or right <= first for left, right, _ in spans):
                spans.append((first, last, by[name]))
        text = unicodedata.normalize("NFC", text)
        for first, last, word in sorted(spans, reverse=True):
            text = text[:first] + word + text[last:]
        return text

    def written(self, text: str) -> list[str]:
        """The names as they stand in the text: "hearts", "Heart"; in Unicode's composed form."""
        composed = unicodedata.normalize("NFC", text)
        return [composed[first:last] for _, first, last in self._places(text)]

    def _places(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Each name with where it begins and ends in the composed text."""
        folded, origin = _seen(text)
        for name, pattern in self._patterns.items():
            for start, end in _spans(pattern, folded):
                yield name, origin[start], origin[end - 1] + 1


@lru_cache(1 << 14)
def _folded(char: str) -> str:
    """One character of a composed text, folded; nothing, where it cannot be seen."""
    if unicodedata.category(char) == "Cf" or char in UNSEEN:
        return ""
    bare = ACCENTS.sub("", unicodedata.normalize("NFKD", char)).casefold()
    return unicodedata.normalize("NFC", ACCENTS.sub("", bare).translate(LETTERS))


def _seen(text: str) -> tuple[str, list[int]]:
    """The folded text, and for each of its characters the position in the composed text."""
    parts = [
        char if char == BLANK else _folded(char) for char in unicodedata.normalize("NFC", text)
    ]
    return "".join(parts), [i for i, part in enumerate(parts) for _ in part]


def _pattern(name: str) -> re.Pattern[str]:
    letters = re.sub(PARTING, "", fold(name)) or fold(name) or name
    forms = [_spaced(letters)]
    if re.search("[a-z]$", letters):
        forms = [f"{forms[0]}(?:e?s)?"]
        forms += [
            _spaced(letters[: -len(end)] + plural)
            for end, plural in PLURALS.items()
            if letters.endswith(end)
        ]
    return re.compile(f"(?=({'|'.join(reversed(forms))}))")  # ahead: no match hides another


def _spaced(letters: str) -> str:
    return f"{PARTING}*".join(map(re.escape, letters))


def _spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """Where it is found as whole words."""
    spans = (match.span(1) for match in pattern.finditer(text))
    return [
        (i, j)
        for i, j in spans
        if not (_in_a_word(text, i, is_end=False) or _in_a_word(text, j, is_end=True))
    ]


def _in_a_word(text: str, at: int, is_end: bool) -> bool:
    """Whether the characters before and behind this position belong to one word."""
    sides = text[max(at - 1, 0) : at + 1]
    if len(sides) < 2 or at == 0 or UNPARTED.search(sides) or (is_end and HANGUL.match(sides)):
        return False
    return all(unicodedata.category(char)[0] in "LNM" for char in sides)
