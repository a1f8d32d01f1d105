"""Export a checkpoint as a Hugging Face folder or a single .pth file, and verify that it is the same model.

    python export_hf.py --checkpoint-path pretrained --output exported
    python export_hf.py --checkpoint-path pretrained --output weights.pth

It runs on any number of ranks; `run/export.py` describes the steps.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from colonnade.command_settings import TrainedModelSettings
from colonnade.errors import UsageError
from colonnade.files import require_free
from colonnade.flags import TrainedModelParser
from colonnade.run_settings import PRECISION_ALIASES
from colonnade.runtime.launch import launch

DTYPES = tuple(PRECISION_ALIASES)
_DTYPE_OF = {short: name for name, short in PRECISION_ALIASES.items()}


def main(arguments: list[str] | None = None) -> None:
    checkpoint, options = _parse(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from colonnade.parallel.mesh import init_parallel
    from colonnade.runtime.vote import on_first_rank
    from run.export import export_checkpoint, export_single_file
    from run.trained_model import open_trained

    layout = init_parallel(None)
    output = Path(options.output)
    on_first_rank(lambda: require_free("--output", output))
    trained = open_trained(checkpoint)
    text = None if options.text_file is None else on_first_rank(lambda: _read_text(Path(options.text_file)))
    if output.suffix == ".pth":
        said = export_single_file(trained, layout, output, options.dtype)
    else:
        said = export_checkpoint(
            trained, layout, output, dtype=options.dtype, max_shard_size=options.max_shard_size, text=text
        )
    if layout.is_main:
        print(said)


# ---------------------------------------------------------------------------------------------------------- the input


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text-file {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text-file {path} is not UTF-8 text (byte {error.start})") from error


def _parse(arguments: Sequence[str] | None) -> tuple[TrainedModelSettings, argparse.Namespace]:
    parser = TrainedModelParser(prog="export_hf.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", required=True, metavar="PATH", help="folder to create, or file to create if the name ends in .pth")
    add(
        "--dtype",
        default="float32",
        type=lambda name: _DTYPE_OF.get(name, name),
        choices=DTYPES,
        help="dtype of the exported weights (default float32, which is exact)",
    )
    text = "maximum size of a weights file (default 5GB); up to this much memory is needed in addition to the model"
    add("--max-shard-size", metavar="SIZE", help=text)
    text = "text to compare logits on (default the first documents of the run's data)"
    add("--text-file", metavar="FILE", help=text)
    checkpoint, options = parser.parse_with_model(arguments)
    if options.output.endswith(".pth"):
        for flag, value in (("--max-shard-size", options.max_shard_size), ("--text-file", options.text_file)):
            if value is not None:
                raise UsageError(f"{flag} {value:.100} is for a folder, and --output {options.output} is one file")
    options.max_shard_size = options.max_shard_size or "5GB"
    if not re.fullmatch(r"[1-9][0-9]{0,5}(KB|MB|GB)", options.max_shard_size):
        raise UsageError(f"--max-shard-size {options.max_shard_size!r:.50} must be a whole number of KB, MB or GB: 5GB")
    return checkpoint, options


if __name__ == "__main__":
    launch(main)
