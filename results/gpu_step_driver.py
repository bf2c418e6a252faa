"""Run groups of gpu_step_experiments.py, each measured alone: `python results/gpu_step_driver.py SECONDS [GROUP...]`.

All groups compile at the same time (a ResNet-50 that compiles in 24 s alone takes 40 to 110 s when eight processes
share 16 cores). Whichever is ready is measured next while every other process of this script is stopped (SIGSTOP), so
that neither their compilation nor their autotuning disturbs it. The run on the H200 lacked this, and its timings are
void. Needs the card to itself and at least 260 s for all groups; RES, CACHE, TURNS and PYTHONPATH as in
gpu_step_experiments.py.

An experiment script for the code of commit 9ac8e3e. It has only been tried on CPU there, before its paths were changed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RES, TURNS = Path(os.environ.get("RES", "runs/gpu_steps")), Path(os.environ.get("TURNS", "runs/gpu_steps/turns"))
FRACTION = {"rn20": "0.03", "rn18": "0.06", "large": "0.19"}  # of an H200's memory
ORDER = ["combos", "rn20", "rn18", "parts", "norms", "torch", "large", "graphs"]
began = time.time()
until = began + float(sys.argv[1])
order = sys.argv[2:] or ORDER


def start(group):
    env = {"CACHE": "runs/gpu_steps/cache", **os.environ, "RES": str(RES), "TURNS": str(TURNS),
           "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_PYTHON_CLIENT_MEM_FRACTION": FRACTION.get(group, "0.1")}  # fmt: skip
    if group == "first":
        del env["TURNS"]
    log = (RES / f"log_{group}.txt").open("w")
    command = [sys.executable, str(HERE / "gpu_step_experiments.py"), group]
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def send(process, number):
    if process.poll() is None:
        os.killpg(process.pid, number)


def say(*words):
    print(f"{time.time() - began:6.1f}", *words, flush=True)


RES.mkdir(parents=True, exist_ok=True)
TURNS.mkdir(parents=True, exist_ok=True)
for old in TURNS.iterdir():
    old.unlink()
start("first").wait()  # alone: its autotuning, on disk, is what the others find
say("first compiled")
running = {group: start(group) for group in order}
try:
    while running and time.time() < until:
        ready = [g for g in order if g in running and (TURNS / f"{g}.compiled").exists()]
        for group in [g for g in running if g not in ready and running[g].poll() is not None]:
            say(group, "ended by itself")
            del running[group]
        if not ready:
            time.sleep(0.1)
            continue
        group = ready[0]
        process = running.pop(group)
        for other in running.values():
            send(other, signal.SIGSTOP)
        time.sleep(0.5)
        (TURNS / f"{group}.go").touch()
        say("measuring", group)
        while process.poll() is None and not (TURNS / f"{group}.done").exists() and time.time() < until:
            time.sleep(0.05)
        say("measured", group)
        send(process, signal.SIGKILL)
        for other in running.values():
            send(other, signal.SIGCONT)
finally:
    for process in running.values():
        send(process, signal.SIGKILL)
say("done; left out:", list(running))
