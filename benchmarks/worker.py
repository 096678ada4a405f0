"""A worker's side of a benchmark in turns: commands come as JSON lines on stdin, answers go out on stdout.

`benchmarks.opentad_worker` imports it under another project's interpreter: it needs Python 3.8 and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, Callable, Mapping  # noqa: UP035  the callable of collections.abc takes no arguments in 3.8

Handler = Callable[..., Mapping[str, Any]]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer commands until stdin ends.

    A command is {"do": NAME, …}; the handler of this name gets the rest as arguments and returns the answer. An
    exception is answered with {"error": its text, "kind": its class}, and "module": the name of one that could not be
    imported. What libraries print to stdout goes to stderr, so that only answers are read as such.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(_answer(handlers, json.loads(line))) + "\n")
            answers.flush()


def _answer(handlers: Mapping[str, Handler], command: dict[str, Any]) -> Mapping[str, Any]:
    try:
        return handlers[command.pop("do")](**command)
    except Exception as error:  # whatever a library raises is told; the conductor decides
        traceback.print_exc()
        answer = {"error": str(error), "kind": type(error).__name__}
        if isinstance(error, ModuleNotFoundError) and error.name:
            answer["module"] = error.name
        return answer


def host_memory() -> dict[str, int]:
    """Return what this process holds of the host's memory and the most it ever held, in bytes; Linux alone tells.

    Not `getrusage`: its maximum begins with that of the process which started this one.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("rss", "VmRSS"), ("peak", "VmHWM"))}
