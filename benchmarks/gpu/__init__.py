"""Checks and costs on an NVIDIA GPU."""
