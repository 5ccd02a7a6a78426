"""Exact search in torch, offered to memlong as a plugin."""

from __future__ import annotations

from memlong.plugins.hookspecs import Register, hookimpl


@hookimpl
def memlong_register_backends(register: Register) -> None:
    """Offer the backend "torch"."""
    register(
        "torch",
        "memlong_torch.index:TorchIndex",
        requires=("torch",),
        install="pip install memlong",
        description="exact search, CPU and CUDA",
    )
