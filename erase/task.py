"""Task: one erasure as a method sees it. Its data are made when they are first asked for, and
kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from erase.latents.batches import Rows
from erase.latents.config import LatentConfig
from erase.latents.latent_set import LatentSet, Source
from erase.latents.prepare import Plan
from erase.mask import SaliencyMask
from erase.models import Cond, DiffusionModel
from erase.models.scopes import select
from erase.prompts.concepts import ConceptSpec
from erase.prompts.reading import as_path
from erase.prompts.several import Together
from erase.tensors import sha256_of


@dataclass(frozen=True)
class Edit:
    """The result of a method: new values, and the evidence of how it came to them."""

    values: Mapping[str, Tensor]
    """parameter name -> new values"""
    losses: Sequence[float] = ()
    """one per optimizer step; none of a closed form"""
    mask: SaliencyMask | None = None


class Task:
    """A model, the concepts to forget in it, and the data that a method asks for on the way."""

    def __init__(
        self,
        model: DiffusionModel,
        concepts: Sequence[ConceptSpec],
        latents: LatentConfig | Source | None = None,
        seed: int = 0,
        folder: Path | None = None,
        earlier: Sequence[ConceptSpec] = (),
    ) -> None:
        """
        Args:
            model: the base; a method leaves it as it was found.
            concepts: each names the thing to forget and the anchor in its place.
            latents: how training data is made, if a method asks for any; or its source.
            seed: fixes every draw.
            folder: where long work is kept, so that a stopped run goes on; None: nowhere.
            earlier: concepts that the model has forgotten before, and must not learn again. The
                base of this erasure is the model as it is now: it is the teacher, and answers
                their prompts with their anchors.
        """
        self.model, self.concepts, self.seed, self.folder = model, tuple(concepts), seed, folder
        self.earlier = tuple(earlier)
        self._latents = latents or LatentConfig()
        self._forget: dict[tuple[float, float], LatentSet] = {}
        self._retain: dict[float, LatentSet] = {}
        self._states: dict[str, Cond] = {}

    def weights(self, scope: str) -> dict[str, nn.Parameter]:
        """The parameters of a scope (`erase.models.scopes`), of the denoiser or of text encoders,
        by name.

        Raises:
            ErasureError: an unknown scope, or one that matches nothing.
        """
        return select(self.model.parameters(), scope)

    def forget(self, anchor_share: float | None = None, power: float = 1.0) -> LatentSet:
        """Latents of the concepts, with their prompts and anchor prompts.

        Args:
            anchor_share: fraction of them that show the anchor instead; None: all as they were
                asked for before, else 0.
            power: of noise that is fixed beforehand, as in `LatentSet.draw_noise`.
        """
        asked = (anchor_share or 0.0, power)
        if anchor_share is None:
            asked = next(reversed(self._forget), asked)
        made = self._forget.pop(asked, None)
        if made is None:
            made = self._embedded(self._source.forget(*asked))
        self._forget[asked] = made  # in the order in which they were asked for
        return made

    def retain(self, power: float | None = None) -> LatentSet:
        """Latents of the things that must stay, with their prompts.

        Args:
            power: see `forget`; None: as they were asked for before, else 1.
        """
        if power is None:
            power = next(reversed(self._retain), 1.0)
        made = self._retain.pop(power, None)
        if made is None:
            made = self._embedded(self._source.retain(power))
        self._retain[power] = made
        return made

    def cond(
        self, prompts: Sequence[str], prefix: Tensor | Mapping[str, Tensor] | None = None
    ) -> Cond:
        """Text states, one row per prompt.

        From memory, each computed once; live and with gradient where a text encoder is being
        trained or attacked.

        Args:
            prompts: the texts.
            prefix: embeddings to stand before each prompt, behind the start token, shape (k, dim);
                by encoder where there are several.
        """
        if prefix is not None or any(param.requires_grad for param in self._encoders):
            return self.model.encode(list(prompts), prefix)
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]
        if fresh:
            states = self.model.encode(fresh)
            self._states |= {prompt: states[row : row + 1] for row, prompt in enumerate(fresh)}
        return Cond.stack([self._states[prompt] for prompt in prompts])

    def predict(self, rows: Rows, prompts: Sequence[str]) -> Tensor:
        """The denoiser's prediction of these rows under these prompts, one each; with gradient
        where enabled."""
        return self.model.predict(rows.noisy, rows.t, self.cond(prompts))

    def generator(self, step: int) -> torch.Generator:
        """The random stream of one step: a function of seed and step, so that a resumed run draws
        the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    @cached_property
    def together(self) -> Together:
        """What becomes of the templates of concepts that are forgotten together."""
        return Together(self.concepts)

    @cached_property
    def _source(self) -> Source:
        if not isinstance(self._latents, LatentConfig):
            return self._latents
        cache = self.folder / "latents" if self.folder else None
        if self._latents.cache:
            cache = as_path(self._latents.cache)
        return Plan(self.model, list(self.concepts), self._latents, self.seed, cache, self.earlier)

    def _embedded(self, latents: LatentSet) -> LatentSet:
        """Embed the prompts of a set while the text encoders are at hand: training may move them
        away and changes kernels."""
        self.cond(["", *latents.prompts, *(latents.anchors or ())])
        return latents

    @cached_property
    def _encoders(self) -> list[nn.Parameter]:
        return [
            param
            for name, param in self.model.parameters().items()
            if name.startswith("text_encoder")
        ]


def describe(task: Task) -> dict[str, str]:
    """The facts that an erasure's artifacts must share (`erase.claims`): base, concepts, seed, and
    digests of the latents made so far."""
    sets = {
        "forget": next(reversed(task._forget.values()), None),
        "retain": next(reversed(task._retain.values()), None),
    }
    return {
        "base_fingerprint": task.model.fingerprint,
        "concepts": json.dumps([{"target": concept.target} for concept in task.concepts]),
        "seed": str(task.seed),
        **{name: sha256_of(vars(latents)) for name, latents in sets.items() if latents is not None},
    }
