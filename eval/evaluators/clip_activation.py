"""With which activation a CLIP was trained, GELU or QuickGELU.

Weights do not tell, and both load; `decide_quick_gelu` asks tags, configs and names instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from erase.eval.evaluators.clip_sources import CONFIG, HUB, LOCAL, Source, tag_config
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Sign:
    """Something that tells the activation."""

    who: str
    quick_gelu: bool
    sure: bool = True
    """not by the mere name of a file or a folder"""


def decide_quick_gelu(source: Source, stated: bool | None) -> bool:
    """Whether the weights were trained with QuickGELU, x * sigmoid(1.702 x), and not with GELU.

    open_clip's tag or the config tells, the ending `-quickgelu` of a model's name, a file's or a
    folder's published name; `stated` is the user's word, which decides what these leave open.

    Raises:
        ErasureError: nothing tells, or two that tell differ.
    """
    signs = _signs(source)
    answers = {sign.quick_gelu for sign in signs}
    sure = {sign.quick_gelu for sign in signs if sign.sure}
    if stated is not None and (stated in sure or not sure):
        return stated
    if stated is None and len(answers) == 1:
        return answers.pop()

    if not answers:
        raise ErasureError(
            f"nothing tells whether {source.weights} was trained with QuickGELU, and {source.name} "
            "exists with both; set clip.quick_gelu: true for weights of OpenAI, DFN and MetaCLIP, "
            "false for LAION's and DataComp's"
        )
    words = [f"{sign.who} says {'QuickGELU' if sign.quick_gelu else 'GELU'}" for sign in signs]
    way_out = (
        "set clip.quick_gelu to the right one" if stated is None else "leave clip.quick_gelu out"
    )
    raise ErasureError(
        f"the activation of {source.name} is in doubt: {', '.join(words)}; {way_out}"
    )


def _signs(source: Source) -> list[Sign]:
    own, weights = source.model.get("quick_gelu"), source.weights
    if weights is None:
        known = _known_repository(source.name.removeprefix(LOCAL).removeprefix(HUB))
        by_name = (
            []
            if known is None
            else [Sign("open_clip's list of such repositories", known, sure=False)]
        )
        stated = [] if own is None else [Sign(CONFIG, own)]
        return by_name + stated or [Sign(f"{CONFIG}, by saying nothing,", False, sure=False)]

    if tag := tag_config(source.name, weights):
        of_model = [Sign(f"open_clip's config of {source.name}", True)] if own else []
        return [Sign(f"the tag {weights!r}", bool(tag.get("quick_gelu"))), *of_model]
    known = _known_file(Path(weights))
    by_name = [] if known is None else [Sign(f"the published name of {weights}", known, sure=False)]
    if own:
        return [Sign(f"the name {source.name}", True), *by_name]
    return (
        by_name
        if by_name or _has_both(source.name)
        else [Sign(f"open_clip's config of {source.name}", False)]
    )


def _has_both(name: str) -> bool:
    """Whether some weights of this architecture want QuickGELU and others do not, as far as
    open_clip knows."""
    import open_clip

    tags = (
        tag_config(name, tag).get("quick_gelu")
        for tag in open_clip.list_pretrained_tags_by_model(name)
    )
    return any(tags) or f"{name}-quickgelu" in open_clip.list_models()


def _known_file(path: Path) -> bool | None:
    """Of a file as it is published: by its name, or by the repository in whose folder or hub cache
    it lies."""
    from open_clip import list_pretrained

    for name, tag in list_pretrained():
        known = tag_config(name, tag)
        if known.get("url") and path.name == known["url"].rpartition("/")[2]:
            return bool(known.get("quick_gelu"))
    return _known_repository(str(path.absolute().parent))


def _known_repository(place: str) -> bool | None:
    """Of `owner/name`, of a folder called `name`, or of a hub cache
    `models--owner--name/snapshots/…`, as open_clip lists it."""
    from open_clip import list_pretrained

    parts = Path(place).absolute().parts if Path(place).is_dir() else Path(place).parts
    cached = {
        part.removeprefix("models--").replace("--", "/")
        for part in parts
        if part.startswith("models--")
    }
    for name, tag in list_pretrained():
        known = tag_config(name, tag)
        repository = known.get("hf_hub", "").strip("/")
        if repository and (
            repository in cached
            or repository in (place, "/".join(parts[-2:]))
            or parts[-1] == Path(repository).name
        ):
            return bool(known.get("quick_gelu"))
    return None
