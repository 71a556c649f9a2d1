"""Per-example gradients: captured by hooks, projected, and checked against autograd."""
