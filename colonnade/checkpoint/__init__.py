"""Checkpoints: saving, restoring, finding, pruning. `docs/checkpoints.md` says what a checkpoint folder holds.

    manifest      names, MANIFEST.json, and whether all files are there
    discover      find_checkpoints: which look complete
    verify        newest_verified, verified: which are what was written
    prune         prune_checkpoints, collect_leftovers
    run_lock      RunLock: one job at a time in a run's folder
    state         flat names for the tensors of a model and its optimizer
    hashing       a file's SHA-256, taken while it is written
    save          save_checkpoint: write aside, make durable, rename
    saver         CheckpointSaver: the same while training goes on
    safe_reader   stored metadata without running what it says
    load          load_model_and_optimizer, at any number of ranks
    single_file   load_single_file: weights from one `.pth`
    run_record    what a manifest says of the run
    hugging_face, hugging_face_export   weights from and to `transformers`' folders
    remote_artifacts, uploads           Weights & Biases: fetched, and sent in the background

Nothing is imported here: `manifest`, `discover` and `prune` need no torch, and whoever only looks at checkpoints should
not wait for it.
"""
