"""Faults of options in one sentence each: the parser library's messages said again."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from erase.prompts.errors import ErasureError

# what others call it -> what it is called here
OTHER_WORDS = {
    "base": "model",
    "base_model": "model",
    "ckpt": "model",
    "pretrained_model_name_or_path": "model",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "iterations": "steps",
    "max_train_steps": "steps",
    "num_inference_steps": "steps",
    "num_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "sampler": "scheduler",
    "height": "resolution",
    "width": "resolution",
    "erase": "concept",
    "target": "concept",
    "output": "out",
    "output_dir": "out",
    "save_path": "out",
}
SHOWN = 4  # near options at most
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{a: 1}'",
}
UNKNOWN = (
    r"[Uu]nrecognized arguments: --([\w.\-]+)",
    r"Key ['\"]([\w.\-]+)['\"] is not expected",
    r"Option '([\w.\-]+)' is not accepted",  # this and the next: keys of a config file
    r"Group '([\w.]+)' does not accept (?:option|nested key) '([\w.\-]+)'",
)


class UnknownOption(ErasureError):
    """An option that the command does not have."""


@dataclass(frozen=True)
class Offered:
    """What a parser takes."""

    options: Collection[str]
    """names of all"""
    switches: Collection[str]
    """those, with their dashes, that take true or false"""
    absent: Mapping[str, str]
    """option, or group of options, that it does not take -> why"""
    shown: str
    """the command line that lists them"""


def complaint(message: str, offered: Offered) -> ErasureError:
    """The error for a message of the parser."""
    for pattern in UNKNOWN:
        if match := re.search(pattern, message):
            name = ".".join(match.groups())
            if why := offered.absent.get(name.split(".")[0]):
                return UnknownOption(
                    f"{why}, so it has no {name}; {offered.shown} lists its options"
                )
            return unknown_option(name, offered)
    if match := re.search(
        r'Parser key "([\w.]+)".*Expected a <class \'list\'>.*value: ([\w.,-]+)\s*$', message, re.S
    ):
        return ErasureError(
            f"{match[1]} is a list, also where it holds one thing: --{match[1]} '[{match[2]}]'"
        )
    if match := re.search(r'Parser key "(\w+)":\s+Unable to load config', message):
        inside = [option for option in sorted(offered.options) if option.startswith(f"{match[1]}.")]
        return ErasureError(
            f"{match[1]} is a group of options; set one of its own, such as "
            f"--{(inside or [match[1]])[0]}"
        )
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        return ErasureError(
            f"{match[1]!r} belongs to no option; write --OPTION before it, and put text with "
            "blanks in quotes"
        )
    if match := re.search(r"argument (?:-\w/)?(--[\w.]+)(?:/\S+)?: expected one argument", message):
        values = ": true or false" if match[1] in offered.switches else ""
        return ErasureError(f"{match[1]} needs a value behind it{values}")
    return ErasureError(_wrong_value(message) or re.sub(r"\s+", " ", message).strip())


def unknown_option(name: str, offered: Offered) -> ErasureError:
    """An error for an option that is not there; it names those that may be meant, never all of
    them, or else the command line that lists them."""
    near = near_options(name, sorted(offered.options))
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"{offered.shown} lists the options"
    )
    return UnknownOption(f"unknown option {name!r}; {hint}")


def near_options(name: str, options: list[str]) -> list[str]:
    """The options that may be meant by a name: the same in other signs or of other groups, of other
    tools, cut short, misspelt."""
    key = name.strip("-").replace("-", "_").casefold()
    group, _, last = key.rpartition(".")
    last = OTHER_WORDS.get(last, last)
    lasts = {option: option.rpartition(".")[2].casefold() for option in options}
    ends = [option for option, end in lasts.items() if end == last]
    depth = min((option.count(".") for option in ends), default=0)
    ways = (
        [option for option in options if option.casefold() in (key, f"{group}.{last}")],
        [option for option in options if option.casefold() == f"{key}s"],
        [option for option in ends if option.count(".") == depth],
        [
            option
            for option, end in lasts.items()
            if len(key) > 1 and key in (option[: len(key)], end[: len(key)])
        ],
        get_close_matches(key, options, 1),
        [
            option
            for option, end in lasts.items()
            if end in get_close_matches(last, set(lasts.values()), 1, 0.7)
        ],
    )
    return next((matches[:SHOWN] for matches in ways if matches), [])


def _wrong_value(message: str) -> str | None:
    """A value of the wrong type: which option, which value, and what it takes."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: ?(.*)$", message, re.S)
    kinds = [
        KINDS[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind in KINDS
    ]
    if not (key and value and kinds):
        return None
    for words in re.findall(r"Expected a typing\.Literal\[(.*?)\]", message):
        kinds += re.findall(r"'(\w+)'", words)
    text = " ".join(value[1].split())[:100]
    return f"--{key[1]} is {text!r}, but it takes {' or '.join(dict.fromkeys(kinds))}"
