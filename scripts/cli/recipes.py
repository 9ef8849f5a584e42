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
        ErasureError: a bare word that is neither a file nor a recipe, or a folder.
    """
    stem, bare = name.removesuffix(".yaml"), Path(name).name == name
    if Path(name).is_file():
        return name
    if bare and stem in recipes():
        return str(RECIPES / f"{stem}.yaml")
    if Path(name).is_dir():
        raise ErasureError(f"--config {name} is a folder; name a .yaml file in it")
    if not bare or Path(name).suffix in (".yaml", ".yml", ".json"):
        return name  # a file that is not there, as its reader says
    near = near_name(name, recipes())
    hint = (
        f"did you mean {near!r}?" if near else "erase-list recipes names all; or give a .yaml file"
    )
    raise ErasureError(f"unknown recipe {name!r}; {hint}")


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
