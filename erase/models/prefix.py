"""Text states of whole batches, with gradient where enabled, and with embeddings of no word
standing before the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erase.models.base import Cond
from erase.models.pipelines import Pipeline, stock, text_encoders
from erase.prompts.errors import ErasureError

HOLDER = "a"
"""a word of one token in every vocabulary: it holds the places that the embeddings take"""


def encode_live(
    pipeline: Pipeline,
    prompts: list[str],
    device: torch.device,
    prefix: Tensor | Mapping[str, Tensor] | None = None,
) -> Cond:
    """Text states of the prompts in one pass.

    Args:
        pipeline: whose text encoders run.
        prompts: n texts.
        device: where the pipeline runs.
        prefix: embeddings behind the start token, shape (k, dim) or (n, k, dim); by encoder where
            there are several, the same k for each.

    Raises:
        ErasureError: a prefix for an encoder that is not there or of a width that is not its own,
            different k, or more than there is room for.
    """
    encoders, way = text_encoders(pipeline), stock(pipeline)
    if prefix is not None and not isinstance(prefix, Mapping):
        prefix = dict.fromkeys(encoders, prefix)
    places = _places(prefix or {}, encoders)
    if places and places > (most := room(pipeline)):
        raise ErasureError(
            f"{places} embeddings or words before a prompt are more than the text encoders can "
            f"read, {most}; take fewer"
        )
    with ExitStack() as stack:
        for name, embeddings in (prefix or {}).items():
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            place = _place(tokenizer, way.text, name)
            stack.enter_context(_standing_before(encoders[name], embeddings, place))
        texts = [f"{HOLDER} " * places + prompt for prompt in prompts]
        cond = way.encoded(texts, device)
    return _zeros_for_empty(pipeline, texts, cond)


def room(pipeline: Pipeline) -> int:
    """How many embeddings can stand before a prompt: the places of the encoder that has fewest,
    without those of its own tokens."""
    text, rooms = stock(pipeline).text, []
    for name in text_encoders(pipeline):
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        rooms.append(tokenizer.model_max_length - len(tokenizer(text("")).input_ids))
    return min(rooms)


def _places(prefix: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> int:
    counts = set()
    for name, embeddings in prefix.items():
        if name not in encoders:
            raise ErasureError(
                f"a prefix for {name!r}, but the model's text encoders are {', '.join(encoders)}"
            )
        width = encoders[name].get_input_embeddings().weight.shape[1]
        if embeddings.shape[-1] != width:
            raise ErasureError(
                f"a prefix of width {embeddings.shape[-1]} for {name}, whose embeddings have "
                f"{width}"
            )
        counts.add(embeddings.shape[-2])
    if len(counts) > 1:
        raise ErasureError(
            f"the prefixes of several encoders have {' and '.join(map(str, sorted(counts)))} "
            "embeddings; give as many for each"
        )
    return counts.pop() if counts else 0


def _place(tokenizer: Any, text: Callable[[str], str], name: str) -> int:
    """How many tokens stand before a prompt, as its encoder takes it."""
    empty, held = (tokenizer(text(prompt)).input_ids for prompt in ("", HOLDER))
    if len(held) != len(empty) + 1:
        raise ErasureError(
            f"{HOLDER!r} is {len(held) - len(empty)} tokens of {name}, so that a prefix has no "
            "place"
        )
    differing = (at for at, ids in enumerate(zip(held, empty, strict=False)) if len(set(ids)) > 1)
    return next(differing, len(empty))


@contextmanager
def _standing_before(encoder: Any, embeddings: Tensor, start: int) -> Iterator[None]:
    """Within the block these embeddings stand in the places of the holders, from `start` on, which
    every row has in the same places."""
    count = embeddings.shape[-2]

    def replaced(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        prefix = embeddings.to(output).expand(len(output), count, -1)
        return torch.cat([output[:, :start], prefix, output[:, start + count :]], dim=1)

    weight = encoder.get_input_embeddings().weight
    embeddings_of = [layer for layer in encoder.modules() if isinstance(layer, nn.Embedding)]
    layers = [layer for layer in embeddings_of if layer.weight is weight]
    # T5 has two, with one weight
    hooks = [layer.register_forward_hook(replaced) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeros_for_empty(pipeline: Pipeline, texts: list[str], cond: Cond) -> Cond:
    """Zeros for the empty prompt, where the pipeline wants them (SDXL)."""
    if not pipeline.config.get("force_zeros_for_empty_prompt", False):
        return cond
    keep = torch.tensor([bool(text) for text in texts], device=cond.embeddings.device)
    return cond.each(lambda tensor: tensor * keep.view(-1, *[1] * (tensor.dim() - 1)))
