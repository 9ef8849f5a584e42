"""Pure numbers: labels and intervals."""
