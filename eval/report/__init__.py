"""Reports: scores of the base, of the erased model and of controls, as JSON, page and card."""
