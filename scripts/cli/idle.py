"""Options that nothing would look at: a user who gives one means something by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from erase.prompts.errors import ErasureError


def check_idle(
    words: Sequence[str], group: str, among: Collection[str], running: Collection[str], what: str
) -> None:
    """Refuse an option of something that does not run.

    Args:
        words: the command line.
        group: what stands before the names in options, `--` or `--attack.`.
        among: names whose options there are.
        running: those of them that run.
        what: the option that says which run.

    Raises:
        ErasureError: such an option, by its name.
    """
    for word in words:
        name, dot, _ = word.removeprefix(group).partition(".")
        if word.startswith(group) and dot and name in among and name not in running:
            option = word.partition("=")[0]
            raise ErasureError(
                f"{option} is given, and {name} does not run ({', '.join(running)}); name it in "
                f"{what}, or leave {option} out"
            )


def check_alone(words: Sequence[str], needs: Mapping[str, tuple[object, str]]) -> None:
    """Refuse an option that does nothing without another which is not there.

    Args:
        words: the command line.
        needs: option -> (whether the other is there, the other).

    Raises:
        ErasureError: such an option, by its name.
    """
    given = {word.partition("=")[0] for word in words}
    for option, (there, other) in needs.items():
        if f"--{option}" in given and not there:
            raise ErasureError(
                f"--{option} does nothing without {other}; add that, or leave --{option} out"
            )
