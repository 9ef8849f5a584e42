"""Settings of training, which every method that takes gradient steps has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from erase.mask import check_density
from erase.prompts.errors import (
    BELOW_ONE,
    COUNT,
    FINITE,
    FRACTION,
    POSITIVE,
    ErasureError,
    check_names,
    check_ranges,
)

MOST_STEPS, MOST_ROWS = 10**7, 2**16
"""bounds against slips of the keyboard: what a run could never finish, and what no memory holds"""


@dataclass
class TrainConfig:
    """How gradient steps are taken."""

    steps: int = 150
    """optimizer steps"""
    lr: float = 1e-4
    """learning rate of the first step"""
    schedule: str = "constant"
    """how it goes on: constant, linear or cosine (both down to zero after the last step)"""
    warmup: int = 0
    """first steps, over which the rate rises to that; adaptive optimizers take their largest steps
    first"""
    batch_size: int = 16
    """forget rows per optimizer step, over all processes and accumulated parts; as many retain
    rows"""
    accumulation: int = 1
    """parts into which each batch is split to save memory; the result is the same to rounding"""
    optimizer: str = "Adam"
    """a class of torch.optim by name (but LBFGS, Muon, SparseAdam); or one of bitsandbytes.optim,
    where installed: AdamW8bit takes a quarter of the state"""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer, e.g. {weight_decay: 0.01, momentum: 0.9}"""
    max_grad_norm: float | None = None
    """clip the norm of the masked gradient to this; None: no clipping"""
    mixed_precision: str = "no"
    """no, bf16, or fp16 (with loss scaling; needs a GPU); what is trained and the optimizer state
    stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    selective_recompute: bool = False
    """recompute only what is cheap (norms, SiLU, GELU, products): about half of the activations'
    memory, 7 % more time, the same bits"""
    attention: str = "auto"
    """kernel of the denoiser's attention: auto (plain for small latents on a CPU, else sdpa), sdpa,
    xformers or sliced"""
    channels_last: bool = False
    """convolutions with the channels innermost in memory: for GPUs with tensor cores; slower on a
    CPU"""
    compile: bool = False
    """torch.compile the denoiser: needs a C++ compiler and minutes before the first step"""
    offload: bool = False
    """keep on the CPU what the steps do not use: VAE, text encoders, with mixed precision the
    float32 weights of the base, and, in one process, the sums of gradients that choose a mask"""
    ema: float | None = None
    """decay of an exponential moving average that the result is taken from (with lora_rank the
    product of the averaged factors, which is not the average of their products); None: the last
    weights"""
    checkpoint_every: int = 50
    """steps between saved training states; a stopped run goes on from the last one"""
    log_with: str | None = None
    """tensorboard, wandb or trackio: log loss, its terms, learning rate and rows per second of
    every step into OUT/logs, or to that service; what is trained stays the same, to the bit"""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch_size", "accumulation", "checkpoint_every"), COUNT)
        check_ranges(
            self, {**counts, "lr": POSITIVE, "max_grad_norm": POSITIVE, "ema": BELOW_ONE}, "train"
        )
        check_ranges(self, {"warmup": (0, MOST_STEPS)}, "train")
        check_ranges(self, {"steps": (1, MOST_STEPS), "batch_size": (1, MOST_ROWS)}, "train")
        if not isinstance(self.optimizer_args, dict) or not all(
            isinstance(name, str) for name in self.optimizer_args
        ):
            raise ErasureError(
                f"optimizer_args is {self.optimizer_args!r}; it must be names with values, e.g. "
                f"{{weight_decay: 0.01}}"
            )
        for other in ("gradient_checkpointing", "compile"):
            if self.selective_recompute and getattr(self, other):
                raise ErasureError(
                    f"selective_recompute and {other} both decide what is recomputed; choose one"
                )


RULES = ("forget", "remap", "benefit", "fisher-ratio", "weight-gradient", "agreement")
LIKE = ("matched-random", "lowest", "inverted")
"""controls that go by another rule"""
CONTROLS = ("random", *LIKE, "none")
ALLOCATIONS = ("global", "per-tensor")
AUTO = ("benefit",)
"""rules whose density can be found"""
COMBINE = ("sum", "surgery", "guard", "barrier")


@dataclass
class MaskConfig:
    """Which weights of the scope may change."""

    rule: str = "forget"
    """how weights are ranked, by gradients at the base. forget: of the concept's denoising error
    (SalUn's). remap: of the loss that training minimises to forget. benefit: the same over the root
    mean square gradient of the retain latents. fisher-ratio, weight-gradient, agreement: see
    docs/masks.md. Or a control: random; matched-random (as many in each tensor as `like` has),
    lowest, inverted; none (all)"""
    density: float | Literal["auto"] = 0.5
    """fraction of the scope's weights that may change; at 1 no mask is needed, and none is
    computed. auto: the smallest of 0.001, 0.003, 0.01, ... that holds enough of what forgetting
    gains at the expense of retaining (docs/masks.md); with the rules that look at both"""
    allocation: str = "global"
    """global: one ranking of all weights; per-tensor: the same fraction of each tensor"""
    like: str = "benefit"
    """the rule that the controls matched-random, lowest and inverted go by"""
    file: str | None = None
    """a saved mask, or the folder of a run that has one, to use as it is, whatever rule and density
    say"""
    saliency: str | None = None
    """saved statistics (saliency.safetensors of a run, or the run's folder) to rank by instead of
    computing them again"""
    guidance: float = 7.5
    """g of (1 + g) eps_c - g eps_null in the forget loss; 7.5 is diffusers' guidance_scale 8.5"""
    batch_size: int = 8
    """forget latents per gradient of the rule forget; the gradients of all batches are summed"""
    batches: int = 24
    """batches of training whose gradients the other rules look at"""
    on_disk: bool = False
    """sum the gradients in the run's folder, and not in memory: slower, for a scope whose one or
    two numbers a weight main memory has no room for; the disk holds them twice. In one process"""

    def __post_init__(self) -> None:
        check_names(self, {"rule": (*RULES, *CONTROLS), "like": RULES, "allocation": ALLOCATIONS})
        check_ranges(self, {"batch_size": COUNT, "batches": COUNT, "guidance": FINITE}, "mask")
        check_ranges(self, {"guidance": (-1, 1000)}, "mask")  # -1: the unconditional branch alone
        if self.density != "auto":
            check_density(self.density, "mask.density")
        elif self.rule not in AUTO:
            raise ErasureError(
                f"mask.density auto weighs forgetting against retaining, and mask.rule {self.rule} "
                f"does not look at both; take {' or '.join(AUTO)}, or give a number"
            )
        if self.like != MaskConfig.like and self.rule not in LIKE:
            raise ErasureError(
                f"mask.like is the rule that {', '.join(LIKE)} go by, and mask.rule is "
                f"{self.rule}; leave mask.like out"
            )
        if self.rule == "inverted" and self.density == 1:
            raise ErasureError(
                "mask.rule inverted lets change what the density leaves out, and mask.density 1 "
                "leaves nothing out; use a lower density"
            )
        if self.file and (self.saliency or self.rule in CONTROLS):
            idle = "mask.saliency" if self.saliency else f"mask.rule {self.rule}"
            raise ErasureError(
                f"mask.file is taken as it is, so {idle} would do nothing; leave one of them out"
            )
        if self.saliency and self.rule in ("random", "none"):
            raise ErasureError(
                f"mask.rule {self.rule} needs no saliency, so mask.saliency would do nothing; "
                "leave one of them out"
            )
        for option, name in (("file", "mask.safetensors"), ("saliency", "saliency.safetensors")):
            path = getattr(self, option)
            if path and Path(path).is_dir():  # of a run, whose file has that name
                path = str(Path(path) / name)
                setattr(self, option, path)
            if path and not Path(path).is_file():
                raise ErasureError(f"mask.{option}: there is no file {path}; check the path")


@dataclass
class TunedConfig:
    """Options of every method that takes gradient steps; they compose, and no method sees them."""

    draws: ClassVar[tuple[str, ...]] = ("n_forget", "n_retain")
    """the numbers of latents that training looks at by the method's defaults; a mask may ask for
    both"""
    one_by_one: ClassVar[bool] = False
    """whether each concept is trained by itself, for `train.steps` steps"""

    scope: str = "full"
    """where weights may change: full (the whole denoiser), xattn, xattn_kv, text_in, selfattn, ff,
    noxattn, text_encoder (`erase-list scopes` explains them), or a pattern of names"""
    mask: MaskConfig = field(default_factory=lambda: MaskConfig(density=1.0))
    train: TrainConfig = field(default_factory=TrainConfig)
    combine: str = "sum"
    """of forgetting and retaining: sum; or, of a loss that has a retain term, surgery (what
    conflicts with retaining is removed from the forget gradient), guard (what would make the forget
    loss rise is removed from the sum) or barrier (the retain gradient, and as much of the forget
    gradient as the forget loss needs to fall at the rate `barrier`)"""
    barrier: float = 1.0
    """of combine barrier: how fast the forget loss must fall, 1 being as fast as by its own
    gradient"""
    sam: float = 0.0
    """radius of sharpness-aware minimisation: the forget gradient is taken this far uphill (L2 norm
    over all trained values); 0: off"""
    smoothing: float = 0.0
    """standard deviation of random displacements over which the forget gradient is averaged; 0:
    off"""
    smoothing_draws: int = 3
    """displacements per step"""
    prox_l1: float = 0.0
    """weight of |change|_1, by a proximal step: small changes go back to the base's bits
    (SalUn-soft), with train.ema those that are small at the end; 0: off"""
    prox_l2: float = 0.0
    """weight of |change|^2 / 2, by a proximal step: every weight is drawn back to the base of this
    run, after an earlier erasure to what that left (L2-SP); 0: off"""
    prox_text: float = 0.0
    """weight of the mean square of what a change of the matrices that are given text states (those
    of scope text_in) makes of the retained prompts' states, by a proximal step: they are drawn back
    as far as those prompts notice, with --after the earlier concepts' too; 1 keeps much; 0: off"""
    confine: float = 0.0
    """changes of the matrices that are given text states (those of scope text_in) stay in the null
    space of the states of the retained prompts, or, with --after, of the earlier concepts' prompts:
    directions in which these have less than this share of their mean square (0.1 in SPEED; smaller
    holds more); 0: off"""
    twofold: bool = False
    """train two parts separately, each from the base: the cross-attention, and everything else.
    Each must forget without the other, and who wants the concept back must undo both. Twice the
    steps"""
    lora_rank: int = 0
    """train the change of each matrix as a product of this rank; vectors keep their values; 0: the
    change itself"""

    @property
    def holding(self) -> str:
        """The option that holds what retained prompts are answered; empty where none does."""
        return "confine" if self.confine else "prox_text" if self.prox_text else ""

    def __post_init__(self) -> None:
        check_names(self, {"combine": COMBINE})
        small = ("sam", "smoothing", "prox_l1", "prox_l2", "prox_text", "barrier")
        check_ranges(
            self,
            {**dict.fromkeys(small, (0, 1e6)), "smoothing_draws": COUNT, "lora_rank": (0, 2**16)},
        )
        if self.sam and self.smoothing:
            raise ErasureError(
                "sam and smoothing both say where the forget gradient is taken; choose one"
            )
        check_ranges(self, {"confine": FRACTION})
        if self.confine and self.prox_text:
            raise ErasureError(
                "confine and prox_text both hold what retained prompts are answered; choose one"
            )
        for name in ("prox_l1", "prox_l2", "prox_text", "confine"):
            if getattr(self, name) and self.lora_rank:
                raise ErasureError(
                    f"{name} acts on single weights, which lora_rank does not train by "
                    "themselves; choose one"
                )
