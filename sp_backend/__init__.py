"""Sequence-parallel attention: plans, their proof, the executor, kernels, models and the worker process."""
