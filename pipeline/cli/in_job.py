"""The command line inside a Ray job, which ``quantmill cancel`` ends in order.

Ray stops a job by a signal. SIGTERM won't do, for ``ray.init`` puts a handler of its own in place of ours; and SIGINT
is ignored by everything under a head that a script started in the background.
"""

from __future__ import annotations

import signal

from pipeline.cli.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
