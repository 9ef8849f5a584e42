"""The interface of a diffusion model to a method: one Protocol, whatever the family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cond:
    """The conditions of a denoiser, one row per prompt."""

    embeddings: Tensor
    """text states, shape (n, tokens, dim)"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """further conditioning by name (SDXL's pooled embeddings, time ids), each shape (n, ...)"""

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Tensor | slice) -> Cond:
        return self.each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Cond:
        return self.each(lambda tensor: tensor.to(device))

    def cat(self, other: Cond) -> Cond:
        """The rows of both, in order."""
        return Cond.stack([self, other])

    @classmethod
    def stack(cls, conds: Sequence[Cond]) -> Cond:
        """The rows of all, in order."""
        extras = {}
        for name in conds[0].extras:
            extras[name] = torch.cat([cond.extras[name] for cond in conds])
        return cls(torch.cat([cond.embeddings for cond in conds]), extras)

    def tensors(self) -> list[Tensor]:
        """The text states, and all further conditioning."""
        return [self.embeddings, *self.extras.values()]

    def each(self, change: Callable[[Tensor], Tensor]) -> Cond:
        """The same change of every tensor."""
        return Cond(
            change(self.embeddings), {name: change(tensor) for name, tensor in self.extras.items()}
        )


@dataclass(frozen=True)
class Tokens:
    """A prompt as one text encoder takes it."""

    ids: tuple[int, ...]
    """of the whole prompt, without begin and end"""
    room: int
    """how many of them the encoder sees"""
    states: range | None = None
    """where the encoder's text states lie among those of the prompt, from the first token's place;
    None: the denoiser is given none of them"""

    @property
    def seen(self) -> tuple[int, ...]:
        return self.ids[: self.room]

    @property
    def cut(self) -> bool:
        return len(self.ids) > self.room


class DiffusionModel(Protocol):
    """All that a method sees. A new family is one file that provides this."""

    name: str
    """where the checkpoint came from: a folder or a hub id"""
    fingerprint: str
    """sha256 over the values of every weight that a method may change"""
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of one latent at the model's own resolution"""
    image_size: int
    """side of an image at the model's own resolution, in pixels"""
    timesteps: int
    """number of training timesteps"""

    @property
    def device(self) -> torch.device: ...

    def encode(
        self, prompts: list[str], prefix: Tensor | Mapping[str, Tensor] | None = None
    ) -> Cond:
        """Text states of the prompts: each by itself, or, where gradients are enabled and an
        encoder's weights or `prefix` take part, in one pass with gradient. `prefix`: embeddings
        behind the start token, shape (k, dim); by encoder where there are several."""

    def tokens(self, prompts: list[str]) -> Mapping[str, list[Tokens]]:
        """Prompts as each text encoder takes them, by the encoder's name."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent posterior, scaled, of images (n, 3, H, W) in
        [-1, 1]."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process q(x_t | x_0)."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of `predict` in training: the noise (epsilon), the velocity (v) or the
        flow."""

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's prediction for x_t, with gradient where enabled."""

    def component(self, name: str) -> nn.Module:
        """`unet` (or the family's denoiser), `text_encoder`, ..."""

    def parameters(self, component: str | None = None) -> dict[str, nn.Parameter]:
        """Weights that may change, named `component.parameter` (`erase.models.naming`), in the
        order of the architecture."""

    def refresh_fingerprint(self) -> None:
        """Compute the fingerprint anew, after weights were changed on purpose."""

    def sample(
        self,
        prompts: list[str] | tuple[Cond, Cond],
        seeds: list[int],
        steps: int,
        guidance: float,
        size: int | None = None,
        prefix: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents of generated images, one seed each, shape (n, *latent_shape); the VAE does not
        run. `prompts`: texts, or their states and the empty one's, as many rows. `prefix`:
        embeddings before every prompt, as for `encode`."""

    def trajectory(
        self, prompts: list[str] | tuple[Cond, Cond], seeds: list[int], steps: int, guidance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The latents of `sample`, and the states that it passed through, as the noise that leads
        there from the finished latents.

        Returns:
            latents x_0, shape (n, *latent_shape); noise, shape (steps, n, *latent_shape), and
            training timesteps t, shape (steps,),
            noisy ones first: `add_noise(x_0, noise[i], t[i])` is the state before step i.
        """

    def pipeline(self) -> Any:
        """The stock diffusers pipeline over the very same modules."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and float32 values; the same for a half-precision file however it
    is loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
