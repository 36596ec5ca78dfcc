"""How much memory an ONNX file takes to load and run, measured in a process that does nothing else.

A process is started that imports ONNX Runtime and reads the inputs. From there on, the high-water mark of
its resident memory, less what was resident at that point, is what the file costs: weights, copies made
while loading, activations. On Linux the mark is set back before loading (``/proc/self/clear_refs``); where
the system only counts up, memory that importing needed for a moment hides as much of the file's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_CHILD = r"""
import json, sys
import numpy as np
import onnxruntime as ort

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def highest():
    try:
        return status("VmHWM")
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def now():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return status("VmRSS")
    except OSError:
        return highest()

path, inputs, threads = sys.argv[1:]
with np.load(inputs) as archive:
    feed = {name: archive[name] for name in archive.files}
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.log_severity_level = 4
before = now()
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, feed)
session.run(None, feed)
print(json.dumps(highest() - before))
"""


def peak_memory(path: Path, inputs: Mapping[str, np.ndarray], *, threads: int = 1) -> int | None:
    """Bytes that loading a file and running it twice adds to a process at its highest.

    Args:
        path: an ONNX file.
        inputs: arrays by input name.
        threads: of the runtime.

    Returns:
        bytes; None where the file does not run, or the system does not count.
    """
    with tempfile.TemporaryDirectory(prefix="compress-memory-") as folder:
        given = Path(folder) / "inputs.npz"
        values: dict[str, Any] = dict(inputs)
        np.savez(given, **values)
        words = [sys.executable, "-P", "-c", _CHILD, str(path), str(given), str(threads)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return max(0, int(json.loads(done.stdout.splitlines()[-1])))
