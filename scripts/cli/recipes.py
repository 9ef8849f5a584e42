"""Config files of the command line: shipped recipes by their names, and files."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from erase.prompts.errors import ErasureError, near_name

RECIPES = Path(__file__).parents[1] / "recipes"


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> str:
    """The path of a config file: of a shipped recipe by its name, where there is no such file, else
    as it is.

    Raises:
        ErasureError: a bare word that is neither a file nor a recipe.
    """
    stem = name.removesuffix(".yaml")
    if Path(name).is_file() or Path(name).name != name:
        return name
    if stem in recipes():
        return str(RECIPES / f"{stem}.yaml")
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return name  # a file that is not there, as its reader says
    near = near_name(name, recipes())
    hint = f"did you mean {near!r}? " if near else ""
    raise ErasureError(
        f"unknown recipe {name!r}; {hint}there are: {', '.join(recipes())}; or give a .yaml file"
    )


def config_files(argv: list[str] | None) -> list[str]:
    """The words behind --config, recipes as their paths."""
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    # nothing behind it is for the real parser to say
    early.add_argument("--config", action="append", default=[], nargs="?")
    return [recipe(path) for path in early.parse_known_args(argv)[0].config if path]


def with_paths(argv: list[str]) -> list[str]:
    """The command line with each recipe's path in the place of its name."""
    words = []
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            word = "--config=" + recipe(word.removeprefix("--config="))
        words.append(
            recipe(word) if i and argv[i - 1] == "--config" and not word.startswith("--") else word
        )
    return words
