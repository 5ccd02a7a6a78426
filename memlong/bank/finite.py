"""Whether keys and values are finite, computed on their own device."""

from __future__ import annotations

import math

import torch

from memlong.errors import InvalidArgumentError


class Finiteness:
    """The minimum and maximum of keys and of values, which a device may still be computing.

    One pass over both, and one small copy to the host. On the CPU they are known at once. On a CUDA device the copy
    goes to page-locked memory, and only `require` waits for it.

    Parameters
    ----------
    keys, values : torch.Tensor
        Of one float dtype and on one device.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not keys.numel():
            self._bounds = torch.zeros(4, dtype=torch.float32, device="cpu")
            return
        wide = (each if each.element_size() > 1 else each.float() for each in (keys, values))
        bounds = torch.stack([bound for each in wide for bound in torch.aminmax(each)])
        if bounds.is_cuda:
            stream = torch.cuda.current_stream(bounds.device)
            self._bounds = torch.empty(4, dtype=bounds.dtype, device="cpu", pin_memory=True)
            self._bounds.copy_(bounds, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        else:
            self._bounds = bounds

    @property
    def is_known(self) -> bool:
        """Whether `require` returns without waiting for a device."""
        return self._event is None

    def require(self) -> None:
        """Raise InvalidArgumentError if a number is not finite; waits for the device if needed."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        bounds = self._bounds.tolist()
        for name, (low, high) in (("keys", bounds[:2]), ("values", bounds[2:])):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidArgumentError(
                    f"{name} must be finite, or they would spoil every attention that reads them, got values from "
                    f"{low} to {high}"
                )
