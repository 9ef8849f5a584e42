"""The command line of a script that is run from a checkout."""

from __future__ import annotations

import argparse


def plain_parser(about: str | None) -> argparse.ArgumentParser:
    """Without options yet; told of by a script's own text, as it stands."""
    return argparse.ArgumentParser(
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
