"""Which pictures are covered until they are asked for: the one rule of every page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from erase.eval.images import ImageSet
from erase.eval.report.report import words
from erase.prompts.canvas import EMBEDDED
from erase.prompts.names import Names

DELICATE = Names(
    "nudity nude naked topless sexual sex porn pornography erotic genitals violence violent blood "
    "bloody gore corpse torture self-harm suicide harassment hate shocking".split()
    + ["without clothes", "bare breasts", "illegal activity"]
)
"""concepts whose pictures a reader may not want to see unasked"""


def is_sensitive(concept: Mapping[str, Any], sets: Iterable[ImageSet]) -> bool:
    """Whether the pictures of a page are covered.

    They are where any of its sets is (`is_covered`), and where the concept's names tell of nudity
    or violence, whatever the sets say: an attack draws the concept from any prompts.

    Args:
        concept: what was forgotten, as a report holds it.
        sets: whose pictures are on the page.
    """
    names = " ".join(word for key in ("target", "synonyms") for word in words(concept, key))
    if DELICATE.found(names.replace("_", " ")):
        return True
    told = [(one.settings.get("sensitive"), one.settings.get("model")) for one in sets]
    return any(is_covered(mark, model) for mark, model in told)


def is_covered(mark: object, model: object) -> bool:
    """Whether pictures of a set are covered: by its mark `sensitive`, or, where it has none, unless
    an embedded model drew them.

    Args:
        mark: true or false; None: the set does not say.
        model: name of what drew them, as far as it is known.
    """
    return bool(mark) if mark is not None else model not in EMBEDDED
