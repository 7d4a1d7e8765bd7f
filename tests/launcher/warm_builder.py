"""Runs ``launcher/corpus.py`` again and again, each time in a new process that has imported everything.

Reads command lines as JSON from stdin and answers each with the process id; then reads an empty line, waits
for the end and answers with the exit code. Until then the id cannot become another process's.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import transformers

    import sharding.build  # noqa: F401
    from launcher.corpus import main

    transformers.AutoTokenizer  # noqa: B018  # imports it
    for line in sys.stdin:
        arguments = json.loads(line)
        if not (pid := os.fork()):
            code = 1
            try:
                code = main(arguments)
            finally:
                os._exit(code)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
