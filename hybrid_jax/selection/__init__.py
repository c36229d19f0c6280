"""Selection: which layers to convert. Scorers say what it costs to convert each layer; the cheapest are chosen."""
