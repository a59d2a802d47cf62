"""Weights of a GPU with a copy in host memory: tensors leave the device and come back."""

import threading
from collections.abc import Sequence

import torch

from rap_env.errors import WeightsUnavailable
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.stored import Piece, Stored


class HostCopies:
    """Copies of some tensors in host memory, pinned where the device is a GPU, which never change.

    To release a tensor leaves an empty one in its place, so that its memory goes back to PyTorch's allocator, for a KV
    cache say; `torch.cuda.empty_cache()` gives it to other processes. To read it copies it to the device again, on a
    stream of its own that has ended before anything may use the tensor. Tensors leave as a whole only: a site with some
    of its parts has copies of what they need.

    A forward that is running has to end before its weights are released: it would fail.

    Args:
        device: Of the model.
    """

    by_parts = False

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._lock = threading.Lock()  # two threads would copy a tensor twice, or one would release what another reads
        self._copies: dict[Stored, torch.Tensor] = {}

    def take(self, stored: Sequence[Stored], digest: str) -> None:
        """Copies tensors; they stay on the device. The model's `digest` is not needed."""
        for one in stored:
            copied = one.laid_out.to("cpu", copy=True)
            self._copies[one] = copied.pin_memory() if self._on_gpu else copied

    def read(self, pieces: Sequence[Piece]) -> None:
        """Has tensors on the device when it returns.

        Raises:
            WeightsUnavailable: The device has no room for them; those that came stay until they are released.
        """
        with self._lock:
            for one, _span in pieces:
                if not self._is_there(one):
                    one.parameter.data = one.as_used(self._arriving(one))
            if self._stream is not None:
                self._stream.synchronize()

    def release(self, pieces: Sequence[Piece]) -> None:
        """Frees tensors of the device."""
        with self._lock:
            for one, _span in pieces:
                one.parameter.data = one.parameter.new_empty(0)

    def freed_bytes(self, piece: Piece) -> int:
        """All of a piece's bytes."""
        return piece[1][1] - piece[1][0]

    def readable(self, layer: DecoderLayer, cut: Sequence[Stored], copied: Sequence[Stored]) -> DecoderLayer:
        """The layer with the tensors that are cut: those on the device, or their copies in host memory."""
        return layer.with_tensors({one.key: self._source(one) for one in cut})

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        return tensor.to(self._device, copy=True)

    def _source(self, one: Stored) -> torch.Tensor:
        here = one.parameter.detach()
        return here if here.numel() else one.as_used(self._copies[one])

    def _is_there(self, one: Stored) -> bool:
        return one.parameter.nbytes == one.n_bytes

    def _arriving(self, one: Stored) -> torch.Tensor:
        try:
            arriving = torch.empty(one.shape, dtype=one.parameter.dtype, device=self._device)
        except torch.OutOfMemoryError as error:
            raise WeightsUnavailable(f"{self._device} has no room for {one.name}: {error}") from error
        if self._stream is None:
            return arriving.copy_(self._copies[one])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # what had this memory before may still run
        with torch.cuda.stream(self._stream):
            return arriving.copy_(self._copies[one], non_blocking=True)
