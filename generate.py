"""Continue prompts with a checkpoint, or with the model of a Hugging Face folder, on any number of ranks.

    python generate.py --checkpoint-path pretrained --prompt 'def ' --max-new-tokens 80
    torchrun --nproc_per_node=2 generate.py --checkpoint-path pretrained --prompts-file prompts.txt --temperature 0

The same seed gives the same tokens at every number of ranks that is a power of two and divides the model evenly.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from colonnade.command_settings import TrainedModelSettings
from colonnade.errors import RunError, UsageError
from colonnade.files import require_free
from colonnade.flags import TrainedModelParser
from colonnade.run_settings import MIN_TEMPERATURE
from colonnade.runtime.launch import launch

if TYPE_CHECKING:
    from model import TensorParallelModel
    from run.text_generation import PromptEncoder, Sampling
    from run.trained_model import TrainedModel

MAX_BATCH = 4096


def main(arguments: list[str] | None = None) -> None:
    checkpoint, options = _parse(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from colonnade.parallel.determinism import fix_arithmetic
    from colonnade.parallel.mesh import init_parallel
    from colonnade.runtime.vote import on_first_rank
    from run.inputs import resolve_precision
    from run.model import DTYPES
    from run.text_generation import PromptEncoder, Sampling, check_length
    from run.trained_model import open_trained

    layout = init_parallel(None)
    if options.output is not None:
        on_first_rank(lambda: require_free("--output", Path(options.output)))
    trained = open_trained(checkpoint)
    texts = [options.prompt] if options.prompt is not None else on_first_rank(lambda: read_prompts(options))
    boundary = trained.settings.add_document_boundary_tokens
    encoder = PromptEncoder(trained.tokenizer, add_document_boundary_tokens=boundary)
    source = "--prompt" if options.prompt is not None else f"--prompts-file {options.prompts_file}:"
    prompts = [encoder.encode(text, source) for text in texts]
    context = trained.config.max_position_embeddings
    check_length(prompts, options.max_new_tokens, context, "--max-new-tokens")
    if options.deterministic:
        fix_arithmetic(compiled=False)
    dtype = DTYPES[resolve_precision(options.precision, layout.device)]
    model = trained.load(layout, compute_dtype=dtype, fixed_order=options.deterministic)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.prompt is not None:
        _stream(trained, model, prompts[0], texts[0], options, sampling, encoder)
    else:
        _in_batches(trained, model, prompts, texts, options, sampling, encoder)


def _stream(
    trained: TrainedModel,
    model: TensorParallelModel,
    prompt: Sequence[int],
    text: str,
    options: argparse.Namespace,
    sampling: Sampling,
    encoder: PromptEncoder,
) -> None:
    """Print the continuation of one prompt as it is sampled."""
    from colonnade.runtime.vote import on_first_rank
    from run.text_generation import generate_tokens

    terminal = _Terminal(text) if model.layout.is_main else None
    tokens: list[int] = []
    for (token,) in generate_tokens(model, [prompt], options.max_new_tokens, sampling, {encoder.end}):
        assert token is not None
        tokens.append(token)
        if terminal is not None:
            terminal.show(text + decoded(trained, tokens))
    if terminal is not None:
        terminal.end(text + decoded(trained, tokens))
    on_first_rank(lambda: _write(options, [Continuation(text, decoded(trained, tokens), len(tokens))]))


def decoded(trained: TrainedModel, tokens: list[int]) -> str:
    return str(trained.tokenizer.decode(tokens))


class _Terminal:
    """Prints a growing text, holding back characters that are still incomplete."""

    def __init__(self, text: str) -> None:
        self._shown = ""
        self.show(text)

    def show(self, text: str) -> None:
        # A character may span several tokens; until its last one, the text ends in a replacement character.
        if not text.endswith("\ufffd"):
            self.end(text, newline="")

    def end(self, text: str, newline: str = "\n") -> None:
        print(text[len(self._shown) :], end=newline, flush=True)
        self._shown = text


@dataclass(frozen=True)
class Continuation:
    """A prompt, the text sampled after it, and the number of tokens sampled."""

    prompt: str
    text: str
    tokens: int


def _in_batches(
    trained: TrainedModel,
    model: TensorParallelModel,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    options: argparse.Namespace,
    sampling: Sampling,
    encoder: PromptEncoder,
) -> None:
    """Continue a list of prompts, and print each with its continuation."""
    from colonnade.runtime.vote import on_first_rank
    from run.text_generation import generate_tokens, tokens_of_rows

    done: list[Continuation] = []
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        steps = generate_tokens(model, batch, options.max_new_tokens, sampling, {encoder.end}, first_row=first)
        for text, row in zip(texts[first:], tokens_of_rows(steps, len(batch)), strict=False):
            done.append(Continuation(text, decoded(trained, row), len(row)))
            if model.layout.is_main:
                print(f"{text}{done[-1].text}\n", flush=True)
    on_first_rank(lambda: _write(options, done))


def _write(options: argparse.Namespace, continuations: Sequence[Continuation]) -> None:
    if options.output is None:
        return
    try:
        with open(options.output, "x", encoding="utf-8") as file:
            write_continuations(file, continuations)
    except OSError as error:
        raise RunError(f"--output {options.output} cannot be written: {error.strerror or error}") from error


def write_continuations(file: TextIO, continuations: Sequence[Continuation]) -> None:
    """Write one JSON object per line, with the keys prompt, text and tokens."""
    for item in continuations:
        file.write(json.dumps({"prompt": item.prompt, "text": item.text, "tokens": item.tokens}) + "\n")


# ------------------------------------------------------------------------------------------------------- the input


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Read the prompts of --prompts-file. Raises UsageError."""
    from colonnade.data.prompts import prompts_in

    return prompts_in(Path(options.prompts_file), "--prompts-file")


def _parse(arguments: list[str] | None) -> tuple[TrainedModelSettings, argparse.Namespace]:
    parser = TrainedModelParser(prog="generate.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="text to continue; the continuation is printed as it is sampled")
    add(
        "--prompts-file",
        metavar="FILE",
        help="prompts to continue: one per line, or in a .jsonl file one object per line with the key prompt",
    )
    add("--output", metavar="FILE", help="also write prompts and continuations to this new file, as JSON lines")
    add(
        "--max-new-tokens",
        type=int,
        default=80,
        metavar="N",
        help="maximum number of tokens to generate per prompt (default 80)",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="sampling temperature; 0 for greedy decoding (default 0.8)",
    )
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0 for all (default 0)")
    text = "sample from the most likely tokens whose total probability reaches P; 1 for all (default 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="random seed for sampling (default 0)")
    text = "prompts of --prompts-file to process at once (default 8)"
    add("--batch-size", type=int, metavar="ROWS", help=text)
    text = "precision of matrix products (default auto: bf16 on accelerators that support it, otherwise fp32)"
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=text)
    text = "generate the same tokens at every number of ranks; one CPU thread per rank (default on)"
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True, help=text)
    checkpoint, options = parser.parse_with_model(arguments)
    if (options.prompt is None) == (options.prompts_file is None):
        raise UsageError("--prompt or --prompts-file: give one of them")
    if options.prompt is not None and options.batch_size is not None:
        raise UsageError(f"--batch-size {options.batch_size} is for the prompts of --prompts-file: leave it out")
    options.batch_size = 8 if options.batch_size is None else options.batch_size
    for name, least, most in (("max_new_tokens", 1, 2**31), ("top_k", 0, 2**31), ("batch_size", 1, MAX_BATCH)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least {least} and at most {most}")
    if not 0 <= options.temperature < math.inf:
        raise UsageError(f"--temperature {options.temperature} must be a number of at least 0")
    if 0 < options.temperature < MIN_TEMPERATURE:
        raise UsageError(f"--temperature {options.temperature} must be 0 or at least {MIN_TEMPERATURE}")
    if not 0 < options.top_p <= 1:
        raise UsageError(f"--top-p {options.top_p} must be above 0 and at most 1")
    if not -(2**63) <= options.seed < 2**63:
        raise UsageError(f"--seed {options.seed} must have 64 bits at most")
    return checkpoint, options


if __name__ == "__main__":
    launch(main)
