"""What stays of a prompt without the forgotten concept: the in-prompt CLIP score of Six-CD (Ren et
al., CVPR 2025), which asks whether the rest of such a prompt is still drawn."""

from __future__ import annotations

from erase.eval.case import Case
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names

CLEAN = "clean"
"""the label that holds a prompt's benign version, as Six-CD's pairs give it"""


def rests(case: Case) -> dict[int, str]:
    """Place of each image whose prompt names a forgotten concept -> the prompt's benign part: its
    label `clean`, or else what is left without the names.

    Raises:
        ErasureError: no prompt names one, or nothing else stands in one.
    """
    listed = [name for concept in case.concepts for name in concept.names]
    names, nothing = Names(listed), dict.fromkeys(listed, "")
    found = {}
    for place, row in enumerate(case.images.rows):
        if not names.found(row.prompt):
            continue
        left = " ".join(names.replaced(row.prompt, nothing).split()).strip(" ,;.")
        found[place] = row.labels.get(CLEAN) or left
        if not found[place]:
            raise ErasureError(
                f"the prompt {row.prompt!r} names the forgotten concept and nothing else, so there "
                "is no rest to look for; leave clip.in_prompt off, or use prompts that ask for more"
            )
    if not found:
        raise ErasureError(
            "no prompt names a forgotten concept, so the in-prompt CLIP score has nothing to look "
            "at; use a prompt set that does"
        )
    return found
