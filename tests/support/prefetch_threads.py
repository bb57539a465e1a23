"""What tests of reading chunk KV ahead share: waiting for its threads."""

import threading
import time


def until(condition):
    """Return whether `condition` came true within five seconds."""
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def running():
    """Return the threads that read ahead."""
    return [one for one in threading.enumerate() if one.name == "ragkit-kv-prefetch"]
