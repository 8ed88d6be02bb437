"""The ledger of a score table: which model and options its rows are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.scoring.index import INDEX_FILE
from ivdr_deploy.scoring.plan import TABLE_VERSION, RunPlan, name_differences
from ivdr_deploy.scoring.shard import shard_names, shard_plan
from ivdr_deploy.scoring.store import Store, damaged


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """``_run.json``: which model and options the rows in a folder are of."""

    run_id: str
    started_at: str
    """UTC time, ISO 8601."""

    plan: RunPlan


def claim_run(store: Store, plan: RunPlan) -> None:
    """Write the ledger, or check that the rows that are there are of the same plan."""
    shards = shard_names(store)
    if store.has(LEDGER_FILE):
        ledger = read_ledger(store)
        if ledger.plan == plan:
            return
        if shards:
            raise _another_run(store, ledger.plan.differences(plan))
    elif shards and (theirs := shard_plan(store, shards[0])) != to_dict(plan):
        _check_version({"plan": theirs}, store)
        where = store.path(shards[0])
        try:
            differences = from_dict(RunPlan, theirs, where="plan").differences(plan)
        except (ConfigError, RecursionError) as error:
            raise damaged(
                where, f"it does not say what its rows are of: {reason_of(error, most=200)}"
            ) from error
        raise _another_run(store, differences)
    if not shards:
        store.remove(INDEX_FILE)  # of another run, or of nobody knows which
    ledger = Ledger(run_id=plan.run_id, started_at=datetime.now(UTC).isoformat(timespec="seconds"), plan=plan)
    text = json.dumps(to_dict(ledger), indent=2, ensure_ascii=False) + "\n"
    store.write(LEDGER_FILE, text.encode())


def _another_run(store: Store, differences: Mapping[str, str]) -> FolderError:
    return FolderError(
        f"{store} holds the scores of another run ({name_differences(differences)})",
        hint="choose another folder with -o, or delete this one if its scores are not needed",
    )


def read_ledger(store: Store) -> Ledger:
    """Read which run a folder belongs to; ``DataError`` if it is no score table, or the ledger is damaged."""
    path = store.path(LEDGER_FILE)
    if not store.has(LEDGER_FILE):
        raise DataError(f"{store} is no score table: it has no {LEDGER_FILE}", hint="`ivdr score` makes one")
    hint = f"delete {path} and run the same `ivdr score` command: the rows that are there stay"
    try:
        with store.open(LEDGER_FILE) as stream:
            values = json.loads(stream.read())
        _check_version(values, store)
        ledger = from_dict(Ledger, values, where=path)
        run_id = ledger.plan.run_id
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"the ledger {path} is damaged ({reason_of(error, most=300)})", hint=hint) from error
    if ledger.run_id != run_id:
        raise DataError(
            f"{path} was changed: it names run {quoted(ledger.run_id)}, expected {run_id}",
            hint=hint,
        )
    return ledger


def _check_version(ledger: object, store: Store) -> None:
    """Refuse a table of another version by name: its columns, or what its shards say about themselves, are others."""
    plan = ledger.get("plan") if isinstance(ledger, dict) else None
    version = plan.get("table_version") if isinstance(plan, dict) else None
    if isinstance(version, int) and version != TABLE_VERSION:
        raise DataError(
            f"{store} is a score table of version {quoted(version)}, this ivdr reads and continues version "
            f"{TABLE_VERSION}",
            hint="pyarrow.parquet.read_table reads its columns, unchecked; to go on, score into another folder",
        )
