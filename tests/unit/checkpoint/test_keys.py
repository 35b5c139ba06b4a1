"""Keys say what they hold, and are read back."""

from __future__ import annotations

import pytest

from perdure.checkpoint import keys
from perdure.checkpoint.manifest import AttemptRecord, Point


def test_keys_name_what_they_hold() -> None:
    record = AttemptRecord(attempt="2.7", parent=None, nonce="ab12")
    folder = keys.folder_key(1200, record)
    assert folder == "checkpoints/objects/step-000000001200/2.7-ab12"
    assert keys.folder_of(keys.manifest_key(folder)) == (folder, Point(1200, "2.7"))
    assert keys.writer_of(keys.receipt_key(folder, 31)) == 31
    assert keys.writer_of(keys.object_key(folder, 31)) is None
    assert keys.point_of(keys.commit_key(Point(1200, "2.7"))) == Point(1200, "2.7")
    assert keys.point_of("checkpoints/commits/x.json") is None
    assert keys.folder_of("checkpoints/objects/other/x") is None
    with pytest.raises(ValueError, match="step -1"):
        keys.folder_key(-1, record)
