"""Judgements: what a judge says of single images, for the page to set below each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one image."""

    word: str
    """what it sees, with its score: `mushroom 98 %`"""
    seen: bool | None = None
    """whether it sees a forgotten concept; None where it does not look for one"""
    right: bool | None = None
    """whether it sees all that the prompt asks for; None where it cannot tell"""


def as_extra(judgements: Mapping[int, Judgement]) -> dict[str, Any]:
    """Judgements by case number, JSON-ready: `words` by case; the cases that are `seen`, and those
    that are `wrong`; None for a question that the judge does not answer."""
    answers = {"seen": True, "right": False}
    listed: dict[str, Any] = {}
    for question, wanted in answers.items():
        given = {case: getattr(one, question) for case, one in judgements.items()}
        told = bool(given) and None not in given.values()
        cases = [case for case, answer in given.items() if answer is wanted]
        listed["wrong" if question == "right" else question] = cases if told else None
    return {"words": {str(case): one.word for case, one in judgements.items()}, **listed}
