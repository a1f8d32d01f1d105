"""How a command begins and ends: one line for an error the user can mend, one exit code, no hanging and no abort."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from colonnade.errors import ColonnadeError, LocalRunError, PeerError, UsageError

# The first process to leave makes torchrun end the others: those with nothing to say give rank 0 time for its line.
_SILENT_SECONDS = 2.0
# torchao, which transformers imports too, warns of each of its kernels that is for another device, and torch of how
# torchao registers its types: pages for every rank.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def launch(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and leave the process with its exit code.

    0 after success, 2 for wrong input, 1 for a run that failed. Rank 0 prints what all ranks know; a rank alone with a
    failure prints its own. The process leaves through `os._exit`, since communication threads of torch abort some
    processes in the interpreter's teardown after everything is done.
    """
    quiet_libraries()
    program = os.path.basename(sys.argv[0])
    rank = os.environ.get("RANK", "0")
    is_main = rank == "0" or not rank.isdecimal()
    code = 0
    try:
        main()
        _leave_group()
    except ColonnadeError as error:
        code = error.exit_code
        if isinstance(error, LocalRunError) or (is_main and not isinstance(error, PeerError)):
            where = f"rank {rank}: " if isinstance(error, LocalRunError) else ""
            kind = "usage error" if isinstance(error, UsageError) else "error"
            # A value that is quoted may hold line breaks; what is printed is one line all the same.
            print(f"{program}: {kind}: {where}{' '.join(str(error).splitlines())}", file=sys.stderr)
        else:
            time.sleep(_SILENT_SECONDS)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:  # argparse, after --help
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):  # as the interpreter does
            print(leaving.code, file=sys.stderr)
    except BrokenPipeError:  # who reads the output has left, as `head` does
        os._exit(128 + signal.SIGPIPE)
    except BaseException:  # noqa: BLE001 - a bug: its traceback is wanted, and the exit must not hang on its threads
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quiet_libraries() -> None:
    """Keep warnings of libraries to themselves that are about nothing a user could mend."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _leave_group() -> None:
    """Destroy the process group, where one was made; torch is not imported for it."""
    if "torch" in sys.modules:
        from colonnade.parallel.mesh import shutdown_parallel

        shutdown_parallel()
