"""Pages from templates: self-contained, with one style sheet, and a script that the page allows by
its digest and no other."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT, SCRIPT = "erase.eval.report", "viewer.js.j2"


def rendered(template: str, **values: Any) -> str:
    """A template of `templates/` as HTML; every value is escaped, and one that is missing is an
    error."""
    return environment().get_template(template).render(values)


def templates(package: str = REPORT) -> Environment:
    """The templates of a package's folder `templates`, and behind them the report's; escaping and
    strict."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(REPORT)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def environment() -> Environment:
    """The templates, the script `viewer` and its digest, and filters.

    `base64` gives a text as it stands in a `data:` address.
    """
    from markupsafe import Markup

    made = templates()
    script = made.get_template(SCRIPT).render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"viewer": Markup(script), "viewer_digest": digest}
    made.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return made
