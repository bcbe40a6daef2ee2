"""The machine that a run has: its device, its precision, its threads, its processes."""

import ctypes
import datetime
import os
import signal
import statistics
import sys
import time
from contextlib import nullcontext, suppress

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm


def find_device(name):
    """The torch.device called auto, cpu, cuda or mps; ValueError where there is none."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name):
        raise ValueError(f"there is no device {name!r} here; auto takes the best there is, or cpu")
    return torch.device(name)


def has_bfloat16(device):
    """Whether this kind of device multiplies matrices in bfloat16, rather than imitating it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def keep_memory():
    """Have glibc keep what is freed for the next step.

    Else a large tensor is given back to the system and comes anew, page by page, each time: this
    takes a tenth to a third of a step's time.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with suppress(OSError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fastest_threads(step):
    """The number of CPU threads with which step() is fastest: all, a half, a quarter, ... or 1.

    On a busy machine threads wait for each other: two can be five times slower than one.
    """
    most, start = torch.get_num_threads(), time.perf_counter()
    if most == 1:
        return 1  # nothing to compare
    times = {most >> halvings: [] for halvings in range(most.bit_length())}
    for n in [*times] * 4:
        if len(times[n]) < 2 or time.perf_counter() - start < 10:
            torch.set_num_threads(n)
            began = time.perf_counter()
            step()
            times[n].append(time.perf_counter() - began)
    return min(times, key=lambda n: statistics.median(times[n][1:]))  # the first warms up


class Run:
    """The processes and the device of this run; alone or under torchrun."""

    def __init__(self, c):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.main, self.stopping = self.rank == 0, False
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.restarted = restarts != "0"  # by torchrun, after a checkpoint of this run
        device = find_device(c.device).type
        if self.world > 1:
            device = "cpu" if device == "mps" else device  # gloo can not reduce tensors of MPS
            self.store, _, _ = next(rendezvous("env://"))
            self.restarted &= self.store.check(["saved"])
            # the store outlives its workers: restarted ones must not read addresses of the dead
            store = dist.PrefixStore(restarts, self.store)
            backend, wait = "nccl" if device == "cuda" else "gloo", datetime.timedelta(hours=3)
            dist.init_process_group(backend, None, wait, self.world, self.rank, store)
        self.device = torch.device(device, self.local) if device == "cuda" else torch.device(device)
        if device == "cuda" and self.local >= torch.cuda.device_count():
            raise ValueError(f"no GPU for process {self.local}: lower --nproc_per_node")
        has_half = has_bfloat16(device)
        if c.dtype == "bfloat16" and device == "cuda" and not has_half:
            raise ValueError("this GPU has no bfloat16: set --dtype=float32")
        half = c.dtype == "bfloat16" or c.dtype == "auto" and has_half
        self.autocast = torch.autocast(device, torch.bfloat16) if half else nullcontext()
        if device == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if c.threads:
            torch.set_num_threads(c.threads)
        if device == "cpu":
            keep_memory()
        # what noise is drawn from; batches and samples have their own
        self.generators = [torch] + [torch.get_device_module(device)] * (device != "cpu")

    def listen(self):
        """From now on Ctrl-C and SIGTERM let the step end and save; a second one ends at once."""

        def stop(*_):
            if self.stopping:
                raise SystemExit(130)
            self.stopping = True
            self.say("stopping after this step; once more to stop at once")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def any_stopping(self):
        return bool(self.mean(torch.tensor(float(self.stopping))) > 0)

    def of_all(self, x):
        """[x of every process]; all of them have to call it."""
        found = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(found, x)
        return found

    def one_first(self, work):
        """work() in the first process of each machine, then, from its cache, in the others."""
        done = work() if self.local == 0 else None
        if self.world > 1:
            dist.barrier()
        return done if self.local == 0 else work()

    def mean(self, x):
        """Mean of a tensor over the processes."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
            x = x / self.world
        return x

    def say(self, text):
        if self.main:
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()
