"""Waiting threads sleep while other programs compute, and spin while none does."""

import os
import subprocess
import sys

import pytest
import torch

from model import threads
from model.threads import busy_ticks, make_room_for_others, watch_others

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's libgomp")

STAT = """cpu  1000 2000 3000 9999 9999 1 1 1 0 0
cpu0 1 20 300 9999 9999 4000 50000 600000 7 7
cpu1 2 0 0 9999 9999 0 0 0 0 0
cpu10 5 0 0 9999 9999 0 0 0 0 0
intr 5
"""
PROCESSOR_TIME = """
import threading, time, torch
from model.threads import hold_team

def used():
    began = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.003)
    return time.process_time() - began

x = torch.zeros(1 << 17)
alone, removed = used(), threading.Event()
team = threading.Thread(target=hold_team, args=(removed,))
team.start()
time.sleep(0.2)
beside = used()
removed.set()
team.join()
print(alone, beside, used())
"""


class InlineThread:
    """Runs its target at once."""

    def __init__(self, target, args=(), daemon=None):
        self.start = lambda: target(*args)


def test_busy_ticks_are_those_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    threads.STAT.write_text(STAT, encoding="ascii")
    assert busy_ticks({0}) == 654321
    assert busy_ticks({1, 10}) == 7


def test_an_idle_team_makes_waiting_threads_sleep(root):
    """The processor time of waiting falls, and rises again when the team is gone."""
    if not threads.STAT.exists() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs Linux and two cores")
    environment = {k: v for k, v in os.environ.items() if k not in threads.SETTINGS}
    environment |= {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROCESSOR_TIME]
    printed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    alone, beside, afterwards = map(float, printed.split())
    assert beside < 0.5 * min(alone, afterwards)


def test_the_team_is_there_while_others_compute(monkeypatch):
    loads = [0.0, 0.1, 0.9, 1.0, 0.0, 0.0, 0.5]  # of other programs, in cores
    teams, states, ticks = [], [], [0.0]

    def sleep(seconds):
        states.append(bool(teams) and not teams[-1].is_set())
        if len(states) > len(loads):
            raise StopIteration
        ticks[0] += loads[len(states) - 1] * os.sysconf("SC_CLK_TCK")

    clock = iter(range(100))
    monkeypatch.setattr(threads.threading, "Thread", InlineThread)
    monkeypatch.setattr(threads.time, "sleep", sleep)
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(threads, "busy_ticks", lambda cores: ticks[0])
    monkeypatch.setattr(threads, "hold_team", teams.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(os.sched_getaffinity(0)))
    with pytest.raises(StopIteration):
        watch_others()
    assert states == [False, False, False, True, True, False, False, True]
    assert len(teams) == 2


@pytest.mark.parametrize(
    ("n_threads", "setting", "watches"),
    [
        (2, None, True),
        (1, None, False),
        (2, "OMP_WAIT_POLICY", False),
        (2, "GOMP_SPINCOUNT", False),
    ],
)
def test_a_user_s_setting_wins(n_threads, setting, watches, monkeypatch):
    started = []
    monkeypatch.setattr(threads.threading, "Thread", InlineThread)
    monkeypatch.setattr(threads, "watch_others", lambda: started.append(True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "10")
    make_room_for_others.__wrapped__()
    assert bool(started) == watches
