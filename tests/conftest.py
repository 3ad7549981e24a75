"""Environment of the whole suite; libraries read these when they are imported, so they come first."""

import os

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

# Test processes share the cores. OpenMP's threads wait for each other by spinning: two a process, on two cores that
# others use too, take 8 times as long as one (measured: four recipes of llama-tiny, 48 s instead of 6 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the processes of runs, which set their own number of threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
