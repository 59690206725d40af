"""Fast kernels: tensors in, tensors out.

A kernel knows no model and no method, and imports torch only. Every file holds the formula in plain torch
(`…_reference`), then the fast version with the same signature, why it is fast, and what it costs.
Nothing is imported here, so that a lesson pays only for the kernel it uses.
"""
