"""The gradient store: what the gradient pass measured, on disk and in memory."""
