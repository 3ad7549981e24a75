"""Run the command line inside a Ray job, with SIGINT enabled, so that ``quantmill cancel`` ends it in order.

Ray stops a job by a signal. SIGTERM doesn't work: ``ray.init`` replaces our handler. SIGINT has to be enabled:
processes under a head that a script started in the background ignore it.
"""

from __future__ import annotations

import signal

from pipeline.cli.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
