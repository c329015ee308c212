"""Search: patterns of single heads at a total budget, and the layers that tolerate Triangle."""
