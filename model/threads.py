"""Room for other programs: on a busy machine, waiting threads sleep instead of spinning.

A thread of PyTorch's OpenMP (GNU's libgomp) that waits for the others spins, 300,000 times, before
it sleeps. That is fastest while the cores are free. Beside another program it takes the core from
the very thread that is waited for. Measured with 2.4 M parameters, 4 × 256 tokens, two threads on
two cores, in tokens/s, quiet and beside one busy process: 11,150 and 600; OMP_WAIT_POLICY=PASSIVE
9,440 and 4,490; GOMP_SPINCOUNT=10000 10,200 and 3,070. No fixed setting is good at both.

libgomp spins 100 times only while a process has more of its threads than there are cores. So
another, idle team of threads is added while other programs compute. Results keep every bit.
"""

import os
import threading
import time
from functools import cache
from pathlib import Path

import torch

STAT = Path("/proc/stat")  # Linux alone has it, and libgomp in its PyTorch
SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # of users, which win
SPARE = 0.2  # of a core: what others may use unnoticed


@cache
def make_room_for_others() -> None:
    """Watch the other programs from now on, where several threads of libgomp compute."""
    if STAT.exists() and torch.get_num_threads() > 1 and not SETTINGS & os.environ.keys():
        threading.Thread(target=watch_others, daemon=True).start()


def watch_others(seconds: float = 1.0) -> None:
    """Every so many seconds, add or remove the idle team."""
    cores, removed = os.sched_getaffinity(0), None
    while True:
        ticks, own, began = busy_ticks(cores), time.process_time(), time.monotonic()
        time.sleep(seconds)
        busy = (busy_ticks(cores) - ticks) / os.sysconf("SC_CLK_TCK")
        others = (busy - (time.process_time() - own)) / (time.monotonic() - began)
        crowded = others > len(cores) - torch.get_num_threads() + SPARE
        if crowded and removed is None:
            removed = threading.Event()
            threading.Thread(target=hold_team, args=(removed,), daemon=True).start()
        elif not crowded and removed is not None:
            removed.set()
            removed = None


def busy_ticks(cores: set[int]) -> int:
    """Time that some cores have worked since the machine was started, in clock ticks."""
    names, ticks = {f"cpu{core}" for core in cores}, 0
    for line in STAT.read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, *interrupts_and_steal = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_steal)
    return ticks


def hold_team(removed: threading.Event) -> None:
    """Let libgomp make a team of threads for this thread, which lasts as long as it does."""
    torch.zeros(1 << 18).add_(1)  # large enough to be computed by several threads
    removed.wait()
