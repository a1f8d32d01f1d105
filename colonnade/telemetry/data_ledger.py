"""What data a run has read. The counts are part of the data position, so kills and resumes neither lose nor repeat any.

Tokens are counted when they are delivered. Rows are counted up to the place where the next block begins.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from colonnade.data.lane import filtered_rows
from colonnade.data.position import DataPosition, LaneCounts
from colonnade.files import replace_file

logger = logging.getLogger(__name__)


def data_metrics(position: DataPosition) -> dict[str, Any]:
    """Columns of a metrics row: tokens read and repeated, rows read and filtered, padding fraction, corpus shares."""
    totals = position.totals()
    total = LaneCounts.sum([*totals.values(), *(counts for _, counts in position.retired)])
    row: dict[str, Any] = {
        "data_tokens_read": total.tokens_delivered + total.tokens_dropped,
        "data_tokens_repeated": total.tokens_repeated,
        "data_rows_read": total.rows,
        "data_rows_filtered": sum(filtered_rows(total).values()),
    }
    if total.padding:
        row["data_padding_fraction"] = total.padding / (total.padding + total.tokens_delivered)
    if len(totals) > 1:
        row |= {f"data_share/{name}": share for name, share in _shares(totals).items()}
    return row


def data_summary(position: DataPosition) -> list[str]:
    """The lines to print at the end of a run, one per corpus."""
    totals = position.totals()
    shares = _shares(totals)
    lines = []
    for index, (name, counts) in enumerate(totals.items()):
        filtered = ", ".join(f"{count:,} {reason}" for reason, count in filtered_rows(counts).items()) or "none"
        skipped = sum(skip.corpus == index for skip in position.skipped)
        share = f"{name}: {shares[name]:.1%} of the tokens; " if len(totals) > 1 else ""
        lines.append(
            f"{share}{counts.tokens_delivered:,} tokens delivered, {counts.tokens_repeated:,} of them again; "
            f"{counts.rows:,} rows read to their end, filtered: {filtered}; {skipped} damaged units skipped"
        )
    return lines


def data_ledger(position: DataPosition) -> dict[str, Any]:
    """The complete ledger, as a JSON object."""
    totals, head = position.totals(), position.head
    shares = _shares(totals)
    corpora = {}
    for index, (corpus, (name, counts)) in enumerate(zip(head.corpora, totals.items(), strict=True)):
        states = position.states[index]
        corpora[name] = {
            "files": corpus.files,
            "weight": position.weights[index],
            "share": shares[name],
            "tokens_read": counts.tokens_delivered + counts.tokens_dropped,
            "tokens_delivered": counts.tokens_delivered,
            "tokens_repeated": counts.tokens_repeated,
            "tokens_dropped": counts.tokens_dropped,
            "padding": counts.padding,
            "rows_read": counts.rows,
            "rows_filtered": filtered_rows(counts),
            "skipped_files": list(corpus.skipped_files),
            "epochs_begun": 1 + max(state.cursor.epoch for state in states),
            "skipped": [
                {"unit": skip.unit, "reason": skip.reason} for skip in position.skipped if skip.corpus == index
            ],
        }
    return {
        "chunks": position.chunk,
        "block_size": head.block_size,
        "packing": head.packing,
        "lanes": head.lanes,
        "tokenizer": head.tokenizer,
        "corpora": corpora,
        "retired": {
            name: {"tokens_delivered": counts.tokens_delivered, "rows_read": counts.rows}
            for name, counts in position.retired
        },
        "weights": [{"from_chunk": chunk, "weights": list(weights)} for chunk, weights in position.schedule],
        "changes": [{"at_chunk": chunk, "what": what} for chunk, what in position.changes],
    }


def write_data_ledger(path: Path, position: DataPosition) -> None:
    """Replace a run's ledger file.

    A failure is a one-line warning and never ends a run: the checkpoint holds the counts too, and the ledger is written
    whole after the next one.
    """
    try:
        replace_file(path, json.dumps(data_ledger(position), indent=2) + "\n")
    except OSError as error:
        logger.warning("%s cannot be written: %s; the next checkpoint's is", path, error.strerror or error)


def _shares(totals: dict[str, LaneCounts]) -> dict[str, float]:
    delivered = max(1, LaneCounts.sum(totals.values()).tokens_delivered)
    return {name: counts.tokens_delivered / delivered for name, counts in totals.items()}
