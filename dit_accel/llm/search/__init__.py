"""Search for a pattern for each head at a total budget, or for the layers that tolerate the Triangle pattern."""
