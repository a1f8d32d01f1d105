"""Checkpoints: saving, restoring, finding, pruning. `docs/checkpoints.md` describes what a checkpoint folder holds.

    manifest      names, MANIFEST.json, and whether all files are present
    discover      find_checkpoints: checkpoints that look complete
    verify        newest_verified, verified: checkpoints whose content is what was written
    prune         prune_checkpoints, collect_leftovers
    retention     Retention: which checkpoints must stay, for pruning and for uploads
    run_lock      RunLock: one job at a time in a run's folder
    state         flat names for the tensors of a model and its optimizer
    hashing       a file's SHA-256, computed during its fsync
    save          save_checkpoint: write to a temporary folder, make it durable, rename it
    saver         CheckpointSaver: the same, while training continues
    safe_reader   reads stored metadata without running code from it
    load          load_model_and_optimizer, at any world size
    single_file   load_single_file: weights from one `.pth`
    run_record    the manifest's record of the run
    hugging_face, hugging_face_export   weights from and to `transformers` folders
    remote_artifacts, uploads           Weights & Biases: download, and upload in the background

Nothing is imported here: `manifest`, `discover` and `prune` do not need torch, and code that only looks at checkpoints
should not have to wait for its import.
"""
