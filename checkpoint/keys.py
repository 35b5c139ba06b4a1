"""Where things lie below a run's folder. The names are part of the format: they never change.

  checkpoints/attempts/<attempt>.json
  checkpoints/objects/step-<step>/<attempt>-<nonce>/w<writer>.safetensors
  checkpoints/objects/step-<step>/<attempt>-<nonce>/w<writer>.receipt.json
  checkpoints/objects/step-<step>/<attempt>-<nonce>/manifest.json
  checkpoints/commits/<step>-<attempt>.json
  checkpoints/bad/<step>-<attempt>.json

Steps have 12 digits, so that the order of names is the order of steps.
"""

from __future__ import annotations

import re

from perdure.checkpoint.manifest import AttemptRecord, Point

ROOT = "checkpoints"
ATTEMPTS = f"{ROOT}/attempts"
OBJECTS = f"{ROOT}/objects"
COMMITS = f"{ROOT}/commits"
BAD = f"{ROOT}/bad"
STEP_MAX = 10**12 - 1

_FOLDER = re.compile(rf"({OBJECTS}/step-(\d{{12}})/(\d+\.\d+)-([0-9a-f]+))/.+")
_RECEIPT = re.compile(r".+/w(\d+)\.receipt\.json")
_POINT = re.compile(r".+/(\d{12})-(\d+\.\d+)\.json")


def attempt_key(attempt: str) -> str:
    return f"{ATTEMPTS}/{attempt}.json"


def folder_key(step: int, record: AttemptRecord) -> str:
    """The folder in which all writers of one step of one attempt meet. Raises ValueError."""
    if not 0 <= step <= STEP_MAX:
        raise ValueError(f"step {step}: steps are numbers from 0 to {STEP_MAX}")
    return f"{OBJECTS}/step-{step:012d}/{record.attempt}-{record.nonce}"


def object_key(folder: str, writer: int) -> str:
    return f"{folder}/w{writer}.safetensors"


def receipt_key(folder: str, writer: int) -> str:
    return f"{folder}/w{writer}.receipt.json"


def manifest_key(folder: str) -> str:
    return f"{folder}/manifest.json"


def commit_key(point: Point) -> str:
    return f"{COMMITS}/{point.step:012d}-{point.attempt}.json"


def bad_key(point: Point) -> str:
    return f"{BAD}/{point.step:012d}-{point.attempt}.json"


def point_of(key: str) -> Point | None:
    """The point that a key of a commit or of a bad mark names."""
    found = _POINT.fullmatch(key)
    return Point(int(found[1]), found[2]) if found else None


def folder_of(key: str) -> tuple[str, Point] | None:
    """The folder that holds an object, receipt or manifest, and what it is part of."""
    found = _FOLDER.fullmatch(key)
    return (found[1], Point(int(found[2]), found[3])) if found else None


def writer_of(key: str) -> int | None:
    """The writer whose receipt lies under `key`; None when it is not a receipt."""
    found = _RECEIPT.fullmatch(key)
    return int(found[1]) if found else None
