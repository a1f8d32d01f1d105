"""Continue a prompt with a trained checkpoint, at any number of ranks.

    python generate.py --checkpoint-path pretrained --prompt 'def ' --max-new-tokens 80

The continuation appears as it is sampled. Every step computes the whole context again; there is no key/value cache yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.errors import UsageError
from colonnade.flags import OneLineParser
from colonnade.parallel.launch import launch

if TYPE_CHECKING:
    from model import TensorParallelModel


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from colonnade.parallel.mesh import init_parallel
    from data_processing import boundary_tokens
    from trained_model import open_trained

    layout = init_parallel(None)
    trained = open_trained(
        Path(options.checkpoint_path),
        tokenizer_path=options.tokenizer_path,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = trained.tokenizer
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False)
    end = tokenizer.eos_token_id
    if trained.settings.add_document_boundary_tokens:
        begin, end = boundary_tokens(tokenizer)
        prompt = [token for token in (begin, *prompt) if token is not None]
    if not prompt:
        raise UsageError("--prompt '' has no tokens, and this run was trained without a token to begin with: give text")

    model = trained.load(layout)
    shown = options.prompt
    if layout.is_main:
        print(shown, end="", flush=True)
    tokens = list(prompt)
    for token in sample(model, prompt, options.max_new_tokens, options.temperature, options.seed):
        if token == end:
            break
        tokens.append(token)
        # A character may take several tokens: print only what has become whole.
        text = options.prompt + tokenizer.decode(tokens[len(prompt) :])
        if layout.is_main and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if layout.is_main:
        print()


def sample(model: TensorParallelModel, prompt: list[int], count: int, temperature: float, seed: int) -> Iterator[int]:
    """Yield `count` token ids that continue `prompt`; the likeliest each time at temperature 0.

    The context is cut to the model's from the left. All ranks draw the same tokens, from generators of one seed.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    context = model.config.max_position_embeddings
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens[-context:]], device=model.layout.device)
        logits = model.logits(ids, last_only=True)[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        tokens.append(token)
        yield token


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="generate.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint-path", required=True, metavar="PATH", help="a run's folder or one checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=80, metavar="N", help="tokens to add (default 80)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="of the sampling; 0 for the likeliest (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("--tokenizer-path", metavar="PATH", help="where the run's tokenizer is now, if it was moved")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    options = argparse.Namespace(**parser.parse(arguments))
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        raise UsageError(f"--temperature {options.temperature} must be a number of at least 0")
    if not -(2**63) <= options.seed < 2**63:
        raise UsageError(f"--seed {options.seed} must have 64 bits at most")
    return options


if __name__ == "__main__":
    launch(main)
