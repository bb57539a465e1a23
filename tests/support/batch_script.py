"""`ragkit` over a tiny world, as processes that fault tests can kill: WORLD.

Loads the packages and the generator once and then forks a process for each line of arguments (JSON) on standard input,
whose id goes to standard output first, and its exit status (negative: the signal that ended it) when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from batch_world import load_engine, open_world

from ragkit import Pipeline
from ragkit.cli.app import main
from ragkit.cli.common import Session
from ragkit.jobs import answering, batch_estimate, job_folder  # noqa: F401 loaded before the forks
from ragkit.settings import Settings


def serve(world: Path) -> None:
    engine = load_engine(world)

    def opened(session: Session, settings: Settings, *, create: bool = False) -> Pipeline:
        return open_world(world, engine)

    Session.open = opened  # type: ignore[method-assign]
    job_folder._LocalJobFolder.group_seconds = 0.0  # every answer is synced: more places to die at
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if not child:
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(request["environ"])
            code = 1
            try:
                code = main(request["arguments"])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
