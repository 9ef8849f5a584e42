"""What an evaluator asks of the model itself, in units whose time can be measured beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from erase.attacks import Asked
from erase.eval.generate import batches
from erase.eval.generate_config import GenerateConfig
from erase.eval.sampling import prepared, sampled
from erase.models import Cond, DiffusionModel, autocast
from erase.models.pipelines import decode, encode, image_size
from erase.prompts.prompt_sets import PromptSet

STEPS = 2
"""denoising steps that are timed, after one that is not"""
ROWS = 4
"""images at a time that a CPU is timed with; a GPU is timed with a whole batch"""
MODELS = 2
"""the base and the erased model: what is done to one is done to the other"""


@dataclass(frozen=True)
class Budget:
    """Of both models together, at most: nothing is known of what lies on disk already, nor of an
    attack that has broken all prompts and stops."""

    images: float = 0
    """drawn as the report's are"""
    asked: Asked = Asked()

    def __add__(self, other: Budget) -> Budget:
        return Budget(self.images + other.images, self.asked + other.asked)


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine."""

    image: float
    """drawn and decoded, as the report's are"""
    prediction: float
    """of a row that passes the denoiser"""
    text: float
    """of a prompt that passes the text encoders"""

    def of(self, budget: Budget, processes: int = 1) -> float:
        """Seconds of a budget. Images are shared among processes; a search is not."""
        asked = budget.asked
        search = asked.predictions * self.prediction + asked.texts * self.text
        return budget.images * self.image / processes + search


def speed(
    model: DiffusionModel,
    prompts: PromptSet,
    made: GenerateConfig,
    clock: Callable[[], float] = perf_counter,
) -> Speed:
    """The speed of this machine. An image is a step's time x all steps, and the decoding, of a
    batch, over its images. What the first step alone takes (kernels that are chosen, memory) is
    left out.

    Args:
        model: it draws.
        prompts: the first of them are drawn.
        made: how.
        clock: in seconds.
    """
    pipe = prepared(model.pipeline(), made)
    device, batch = pipe._execution_device, batches(prompts, made)[0]
    rows = batch.rows if device.type != "cpu" else batch.rows[:ROWS]
    null = Cond.stack([encode(pipe, [""], device)] * len(rows))
    began = clock()
    cond = Cond.stack([encode(pipe, [row.prompt], device) for row in rows])
    cond.embeddings.sum().item()  # until it is there
    text = (clock() - began) / len(rows)
    seeds, side = [row.seed for row in rows], made.resolution or image_size(pipe)

    def take(steps: int) -> tuple[float, Any]:
        began = clock()
        with autocast(device, made.mixed_precision):
            latents = sampled(pipe, cond, null, seeds, batch.guidance, steps, side)
        latents.sum().item()
        return clock() - began, latents

    most = min(made.steps, STEPS)
    take(1)
    spent, latents = take(most)
    step = spent / most / len(rows)
    began = clock()
    decode(pipe, latents, made.mixed_precision).sum().item()
    image = step * made.steps + (clock() - began) / len(rows)
    return Speed(image, step / predictions(batch.guidance), text)


def predictions(guidance: float) -> int:
    """Rows that pass the denoiser in each step of an image: with and without the prompt, where
    there is guidance."""
    return 2 if guidance > 1 else 1
