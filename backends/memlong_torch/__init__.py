"""Exact search in torch as a memlong plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Register the backend "torch"."""
    register(
        "torch",
        "memlong_torch.index:TorchIndex",
        requires=("torch",),
        install="pip install memlong",
        description="exact search on the CPU or a CUDA device",
    )
