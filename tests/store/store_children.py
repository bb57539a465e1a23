"""Work in forked processes, which tests may crash or kill."""

import os
import sys
import traceback


def start_child(work):
    """Run `work` in a forked process and return its process id; it exits with 0, or with 1 after an exception."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def in_child(work):
    """Run `work` in a forked process and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work), 0)[1])
