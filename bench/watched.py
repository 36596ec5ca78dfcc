"""Runs a command and writes down how long it took, how much of a processor and how much memory it needed.

    python -I -S watched.py RESULT.json COMMAND ARGUMENT...

A process of its own because Linux counts the memory of the process that starts another one as the
other's, too: started from a benchmark that holds a model, even `true` would "need" a gigabyte.
"""

import json
import os
import sys
import time

began = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
result = {
    "seconds": time.perf_counter() - began,
    "processor_seconds": usage.ru_utime + usage.ru_stime,
    "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    "code": os.waitstatus_to_exitcode(status),
}
with open(sys.argv[1], "w") as file:
    json.dump(result, file)
