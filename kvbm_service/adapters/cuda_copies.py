"""Copying pieces of memory between a CUDA device and pinned host memory.

Addresses are unified, so one call serves both directions. Copies go through a stream of our
own, beside the engine's: they neither wait for its kernels nor hold them up. What must be
ordered with them is ordered by a fence (`mark`).
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from kvbm_service.adapters.copies import Column
from kvbm_service.adapters.mover import Fence
from kvbm_service.errors import TransferError

SOURCE_IN_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: a source is read when its copy's turn comes, not before."""


class _Location(ctypes.Structure):
    """CUmemLocation; a hint for managed memory only."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class CudaCopies:
    """`Copies` for an engine whose KV tensors are on CUDA device `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        driver = ctypes.CDLL("libcuda.so.1")
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._one = driver.cuMemcpyAsync
        self._one.argtypes = [ctypes.c_uint64, ctypes.c_uint64, size, address]
        self._many = getattr(driver, "cuMemcpyBatchAsync", None)  # since CUDA 12.8
        if self._many is not None:
            self._many.argtypes = [
                *(address, address, address, size),  # to, from, lengths, how many
                *(address, address, size),  # attributes, the first copy of each, how many
                *(address, address),  # which one failed, stream
            ]

    def mark(self) -> Fence:
        event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
        event.record(torch.cuda.current_stream(self._device))
        wait: Fence = event.synchronize
        return wait

    def pin(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self._device):
            error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(error) != 0:
            raise TransferError(
                f"CUDA cannot pin {nbytes} bytes of host memory (error {int(error)}): "
                "raise the limit on locked memory, or set DYN_KVBM_CPU_CACHE_GB lower"
            )

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] = torch.empty(
            nbytes, dtype=torch.uint8, pin_memory=True
        ).numpy()
        return buffer

    def copy(self, to: Column, source: Column, lengths: Column) -> None:
        if not len(to):
            return
        with torch.cuda.device(self._device):  # makes the context this thread's
            error = self._queue(to, source, lengths)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            try:
                done.synchronize()  # also after an error: some copies may be under way
            except RuntimeError as failure:
                raise TransferError(f"the device failed: {failure}") from failure
        if error:
            raise TransferError(f"the CUDA driver refused a copy: error {error}")

    def _queue(self, to: Column, source: Column, lengths: Column) -> int:
        stream = self._stream.cuda_stream
        if self._many is None:
            for piece in zip(to.tolist(), source.tolist(), lengths.tolist(), strict=True):
                if error := int(self._one(*piece, stream)):
                    return error
            return 0
        attributes = _Attributes(source_order=SOURCE_IN_STREAM_ORDER)
        applies_from, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        return int(
            self._many(
                *(column.ctypes.data for column in (to, source, lengths)),
                len(to),
                ctypes.addressof(attributes),
                ctypes.addressof(applies_from),
                1,
                ctypes.addressof(failed),
                stream,
            )
        )
