"""Counts the CUDA calls of a function: kernel launches by name, copies and synchronisations.

On a real GPU they come from torch's profiler. The virtual GPU does not support it and has counters
of its own.
"""

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import VIRTUAL


class Calls(NamedTuple):
    launches: Counter[str]  # by (mangled) kernel name
    to_host: int  # device-to-host copies, or their bytes
    on_device: int  # device-to-device copies and memsets
    waits: int  # synchronisations

    def of(self, *names: str) -> int:
        """Launches of kernels whose name contains one of `names`."""
        return sum(n for name, n in self.launches.items() if any(w in name for w in names))


def cuda_calls(run: Callable[[], Any]) -> Calls:
    """The calls that `run` makes. It is run once before, to exclude one-time initialisation."""
    run()
    return _on_the_virtual_gpu(run) if VIRTUAL else _on_a_gpu(run)


def _on_a_gpu(run: Callable[[], Any]) -> Calls:
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")  # reset below: the profiler itself synchronises
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    events = profile.events() or []
    kernels = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    return Calls(
        Counter(name for name in kernels if not name.startswith(("Memcpy", "Memset"))),
        sum(name.startswith("Memcpy DtoH") for name in kernels),
        sum(name.startswith(("Memcpy DtoD", "Memset")) for name in kernels),
        sum(e.name in waits for e in events),
    )


def _on_the_virtual_gpu(run: Callable[[], Any]) -> Calls:
    counters = ctypes.CDLL(None).vg_counters_json
    counters.restype = ctypes.c_char_p
    bridge = sys.modules["vgpu.torch_bridge"]

    def now() -> Counter[str]:
        counts = Counter(json.loads(counters())["host"])
        counts.update(bridge.copied)
        counts["waits"] = bridge.calls.get("_local_scalar_dense", 0)
        return counts

    before = now()
    run()
    after = now()
    after.subtract(before)
    launches = {k.removeprefix("launch:"): n for k, n in after.items() if k.startswith("launch:")}
    waits = ("device_synchronize_calls", "stream_synchronize_calls", "waits")
    copied = after["memcpy_calls"] + after["memset_calls"]
    return Calls(
        Counter(launches), after["memcpy_d2h_bytes"], copied, sum(after[name] for name in waits)
    )
