"""A module that starts a thread when it's imported, after which its process mustn't be forked."""

import threading
import time

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
