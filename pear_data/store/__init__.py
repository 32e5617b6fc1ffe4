"""The store on disk: manifest, checksums, atomic commits, one writer at a time."""

from pear_data.store.store import Store, open_store, writable_store

__all__ = ["Store", "open_store", "writable_store"]
