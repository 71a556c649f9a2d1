"""Time and memory of the gradient pass, of the store and of estimates."""
