"""Triton kernels, their configurations and launchers. Only kernels.py imports Triton, and only a launch imports it."""
