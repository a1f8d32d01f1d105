"""Checkpoints: saving, restoring, finding, pruning. `docs/checkpoints.md` says what a checkpoint folder holds.

    manifest      names, MANIFEST.json, and whether all files are there
    discover      find_checkpoints, latest_checkpoint, resolve_checkpoint
    prune         prune_checkpoints, collect_leftovers
    state         flat names for the tensors of a model and its optimizer
    save          save_checkpoint: write aside, make durable, rename
    safe_reader   stored metadata without running what it says
    load          load_model_and_optimizer, at any number of ranks
    single_file   load_single_file: weights from one `.pth`

Nothing is imported here: `manifest`, `discover` and `prune` need no torch, and whoever only looks at checkpoints should
not wait for it.
"""
