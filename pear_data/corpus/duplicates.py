"""Sample ids that occur twice in a corpus, found with DuckDB within a bound on memory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pear_data.corpus.records import shown
from pear_data.errors import PearError
from pear_data.store import Store
from pear_data.store.commit import TEMP_SUFFIX
from pear_data.store.manifest import Shard

MEMORY_LIMIT = "512MB"


def duplicate_error(sample_id: str, first: str, second: str) -> PearError:
    """The refusal of an id found at two places."""
    return PearError(
        f"the sample id {shown(sample_id)} occurs twice, at {first} and at {second}: take one out, name another field "
        "with --id-field, or number the rows with --id-field :row (then with a new --store, if this one has shards)"
    )


def check_unique_ids(store: Store, shards: Sequence[Shard]) -> None:
    """Refuse a corpus in which samples of two shards share an id; within a shard its writer has looked.

    Raises:
        PearError: names one such id and two places where it stands.
    """
    sample_id = _repeated_id(store) if len(shards) > 1 else None
    if sample_id is None:
        return
    places: list[str] = []
    for shard in shards:
        start = 0
        for table in store.row_groups(shard, ["sample_id"]):
            found = pc.indices_nonzero(pc.equal(table["sample_id"], sample_id)).to_pylist()
            places += [f"row {start + row + 1} of {shard.file.path}" for row in found]
            start += len(table)
        if len(places) > 1:
            break
    raise duplicate_error(sample_id, *places[:2])


def _repeated_id(store: Store) -> str | None:
    spill = store.path / f"ids{TEMP_SUFFIX}"
    try:
        with duckdb.connect(
            config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(spill), "threads": 1}
        ) as connection:
            ids: pa.RecordBatchReader = store.corpus.scanner(
                columns=["sample_id"], batch_readahead=1, fragment_readahead=1, use_threads=False
            ).to_reader()
            connection.register("ids", ids)
            found = connection.execute(
                "SELECT sample_id FROM ids GROUP BY sample_id HAVING count(*) > 1 LIMIT 1"
            ).fetchone()
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise PearError(
            f"cannot check the sample ids of {store.path} for duplicates: {reason}; free space there and run the same "
            "command again"
        ) from error
    finally:
        shutil.rmtree(spill, ignore_errors=True)
    return None if found is None else str(found[0])
