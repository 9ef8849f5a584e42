"""Text encoders that are language models, asked as in a chat: a template around the prompt, and
text states of as many tokens as there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from erase.models.base import Cond
from erase.models.stock import Patched
from erase.prompts.errors import ErasureError

LENGTH = "length"
"""how many of a row's text states are any, and not filling"""
MARK = "\x00"
"""a prompt that no template holds"""
PROBES = ("", "a Red house, in a box", " spaces ")
"""prompts that must stand in a template as they are"""


class Chat(Patched):
    """A pipeline whose one tokenizer is given the prompt in a chat template."""

    thinking: ClassVar[bool] = False
    """the template's `enable_thinking`"""

    def filled(self, prompt: str) -> str:
        """The checkpoint's own template around a prompt; transformers renders it in a sandbox."""
        text: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return text

    def text(self, prompt: str) -> str:
        return self.filled(prompt)

    def head(self) -> int:
        """Tokens of the template before the prompt."""
        return len(self.pipeline.tokenizer(self.filled(MARK).partition(MARK)[0]).input_ids)

    def room(self, tokenizer: Any) -> int:
        return self.tokens - self.head()

    def states(self, encoder: str) -> range | None:
        return range(self.head(), self.tokens)

    def check_template(self, name: str) -> None:
        """Refuse a template in which a prompt does not stand as it is, and a tokenizer that does
        not fill up behind it.

        Raises:
            ErasureError: says which.
        """
        try:
            text = self.filled(MARK)
        except Exception as error:  # of the template's own kind
            raise ErasureError(
                f"{name}: the chat template of its tokenizer cannot be filled: "
                f"{error or type(error).__name__}; fetch the tokenizer again, whole"
            ) from error
        before, _, behind = text.partition(MARK)
        if any(self.filled(probe) != before + probe + behind for probe in PROBES):
            raise ErasureError(
                f"{name}: in the chat template of its tokenizer a prompt does not stand once and "
                "as it is; give the tokenizer that belongs to the model"
            )
        if self.pipeline.tokenizer.padding_side != "right":
            raise ErasureError(
                f"{name}: its tokenizer fills up short prompts on the "
                f"{self.pipeline.tokenizer.padding_side}; write padding_side right into its "
                "tokenizer_config.json"
            )


def padded(states: Sequence[Tensor], tokens: int) -> Cond:
    """Text states of several lengths, each (length, dim), filled up with zeros."""
    rows = [pad(row, (0, 0, 0, tokens - len(row))) for row in states]
    lengths = torch.tensor([len(row) for row in states], device=rows[0].device)
    return Cond(torch.stack(rows), {LENGTH: lengths})


def unpadded(cond: Cond) -> list[Tensor]:
    """The states of each row without their filling."""
    lengths = cond.extras[LENGTH].tolist()
    return [row[:length] for row, length in zip(cond.embeddings, lengths, strict=True)]


def masked(cond: Cond) -> tuple[Tensor, Tensor]:
    """Text states as long as the longest row's, and where they are any."""
    lengths = cond.extras[LENGTH]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return cond.embeddings[:, :longest], mask
