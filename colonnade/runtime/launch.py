"""How a command starts and exits: one line for an error that the user can fix, one exit code, no hang and no abort."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from colonnade.errors import ColonnadeError, LocalRunError, PeerError, UsageError
from colonnade.screen import surviving

# When the first process fails, torchrun ends the others: ranks with nothing to print give rank 0 time to print.
_SILENT_SECONDS = 2.0
# torchao, which transformers imports too, warns about each of its kernels for another device, and torch about how
# torchao registers its types: pages of output on every rank.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def launch(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit the process with its exit code.

    0 for success, 2 for invalid input, 1 for a failed run, 130 after an interrupt. Rank 0 prints errors that all ranks
    know; a rank whose failure no other rank knows prints it itself. The process exits through `os._exit`, because
    torch's communication threads abort some processes during interpreter teardown, after all work is done.

    Characters that the screen's encoding lacks appear as escapes: no text that is shown may end a command.
    """
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
            # A quoted value may contain line breaks; the output is one line all the same.
            with surviving(sys.stderr):
                print(f"{program}: {kind}: {where}{' '.join(str(error).splitlines())}", file=sys.stderr)
        else:
            time.sleep(_SILENT_SECONDS)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:  # argparse, after --help
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):  # as the interpreter would
            with surviving(sys.stderr):
                print(leaving.code, file=sys.stderr)
    except BrokenPipeError:  # the reader of the output has exited, as `head` does
        os._exit(128 + signal.SIGPIPE)
    except BaseException:  # noqa: BLE001 - a bug: show its traceback, and do not let the exit hang on threads
        with surviving(sys.stderr):
            traceback.print_exc()
        code = 1
    os._exit(_flushed(code))


def _flushed(code: int) -> int:
    """Flush the screen; the exit code, which is not 0 where output was lost that nobody has spoken of."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
    except OSError as error:
        with surviving(sys.stderr):
            print(f"error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        code = code or 1
    with surviving(sys.stderr):
        pass
    return code


def quiet_libraries() -> None:
    """Silence library warnings about things that a user cannot fix."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _leave_group() -> None:
    """Destroy the process group if there is one, without importing torch for it."""
    if "torch" in sys.modules:
        from colonnade.parallel.mesh import shutdown_parallel

        shutdown_parallel()
