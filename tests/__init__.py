"""A package, so that no installed `tests` of another distribution comes before it."""

import os

# before a library reads it: a download that fails would be tried again for half a minute
os.environ.setdefault("HF_HUB_OFFLINE", "1")
