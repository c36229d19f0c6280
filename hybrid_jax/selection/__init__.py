"""Selection: which layers to convert. Scorers say what it costs to convert each layer; the cheapest are chosen."""

BUDGETS = ("layers", "heads", "bytes")  # what a choice may be a share of, or fit in; see `selection.budgets`
