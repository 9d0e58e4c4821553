"""How training scales: a race on some ranks, curves over numbers of ranks, and a model that goes beyond them."""
