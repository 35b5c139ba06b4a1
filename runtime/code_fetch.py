"""A short-lived child of the agent: fetch the code package, verify it, unpack it into a folder.

A process of its own because the store's client has threads and weight, and the agent has neither. The
package is unpacked beside its place and moved there whole, so that a folder that exists is complete.
Paths that lead out of the folder are refused by tarfile's "data" filter.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile

PROGRAM = "import sys; sys.path.pop(0); from perdure.runtime.code_fetch import main; main()"
_BYTES_MAX = 100 * 10**6
_UNPACKED_BYTES_MAX = 2 * 10**9


def main() -> None:
    """Configuration as JSON on stdin: {store, key, sha256, target}. Exit 0, or 1 with one line."""
    config = json.load(sys.stdin)
    try:
        fetch(config["store"], config["key"], config["sha256"], config["target"])
    except Exception as error:  # noqa: BLE001 - any failure is the answer, in one line
        print(f"the code package could not be unpacked: {error}", file=sys.stderr)
        sys.exit(1)


def fetch(store_url: str, key: str, sha256: str, target: str) -> None:
    """Raises ValueError when the bytes are not those that were submitted."""
    from perdure.checkpoint.store import open_store

    store = open_store(store_url)
    try:
        data = store.get(key)
    finally:
        store.close()
    unpack(data, sha256, target)


def unpack(data: bytes, sha256: str, target: str) -> None:
    import zstandard

    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"its sha256 is {found}, and should be {sha256}: altered in the store?")
    if len(data) > _BYTES_MAX:
        raise ValueError(f"it has {len(data)} bytes, over the limit of {_BYTES_MAX}")
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
        plain = reader.read(_UNPACKED_BYTES_MAX + 1)
    if len(plain) > _UNPACKED_BYTES_MAX:
        raise ValueError(f"it unpacks to more than {_UNPACKED_BYTES_MAX} bytes")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".unpacking-", dir=os.path.dirname(target))
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            tar.extractall(beside, filter="data")
        with contextlib.suppress(FileExistsError, OSError):
            os.rename(beside, target)  # another agent of this machine may have been first
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not os.path.isdir(target):
        raise ValueError(f"{target} could not be made")
