"""A package, so that no installed `tests` of another distribution comes before it."""
