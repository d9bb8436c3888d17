"""Layers that carry-ons are made of: attention, linear layers, norms, rotations and gates.

`attention` and `elementwise` choose the implementation: PyTorch, `blockwise` on a CPU, or the
Triton kernels in `kernels`. `linear` holds the products.
"""
