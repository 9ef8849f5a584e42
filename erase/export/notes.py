"""The limits of an export in words, for its model card."""

from __future__ import annotations

from erase.delta import ErasedDelta
from erase.export.lora import LAYOUTS, LoRA


def notes_on(delta: ErasedDelta, dtype: str, *, restored: bool, measured: bool) -> list[str]:
    """Sentences of a card on these weights, beside their scores.

    Args:
        delta: what changed.
        dtype: of the weights in the files, by name.
        restored: whether the concept was put back.
        measured: whether the card has scores.
    """
    notes: list[str] = []
    if restored:
        notes.append(
            "The concept was put back: these are the weights of the base before it was erased."
        )
    if dtype != "float32":
        notes.append(
            f"The weights are rounded to {dtype}; scores are those of the float32 weights."
        )
    if not measured and "parts" in delta.metadata:
        notes.append(
            "These deltas, at these strengths, were not measured together; scores of each alone "
            "say nothing of it."
        )
    return notes


def lora_notes(lora: LoRA, layout: str, *, measured: bool) -> list[str]:
    """The same of a LoRA in a layout of `LAYOUTS`; `measured`: whether the scores are its own."""
    whose = (
        "of base + LoRA" if measured else "of the exact weights; the LoRA itself was not measured"
    )
    return [
        f"The LoRA is an approximation: {missed(lora)}. Scores are those {whose}.",
        f"Its keys are in the {layout} layout: {LAYOUTS[layout]}; {passed_over(lora)}.",
    ]


def missed(lora: LoRA) -> str:
    """The part of the change that a LoRA loses."""
    return (
        f"it misses {lora.error:.1%} of the change (relative Frobenius norm); "
        f"{lora.left_out_share:.1%} of the squared change lies in {len(lora.left_out)} parameters "
        "that no LoRA holds (biases, norms)"
    )


def passed_over(lora: LoRA) -> str:
    """The part of a LoRA that some programs pass over."""
    if lora.layout != "kohya":
        return "other programs have not been tried with it"
    if not lora.outside:
        return "every layer of it lies in the blocks, which all of them read"
    names = ", ".join(name.split(".", 1)[1] for name in lora.outside)
    return (
        f"sd-scripts and stable-diffusion.cpp pass over {names} ({lora.outside_share:.1%} of the "
        "squared change)"
    )
