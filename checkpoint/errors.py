"""The error tree of checkpoints. An error says what happened, whose fault it is and what to do next.

CheckpointError           never raised itself
  StoreError              the store's: a request that failed for good
    StoreUnreachable      nothing answers, or not in time
    StoreRefused          it answers, and refuses the credentials
    NoSuchBucket          the bucket (or the folder's root) does not exist
    KeyExists             a create-only put found the key taken
    KeyMissing            the key is not there
  FormatError             a record that is cut short, altered, or of a newer version
  IntegrityError          bytes that do not match their checksum: nothing of them was used
  StateError              the caller's state does not fit what is stored, or cannot be stored
  ForkError               a store client used in a forked child, where it would hang for ever

This folder must not import `perdure.runtime`, so the tree is its own; the launcher maps it.
"""


class CheckpointError(Exception):
    """`str(error)` is what happened and whose fault it is; `hint` is what to do next."""

    default_hint = ""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        if type(self) is CheckpointError:
            raise TypeError("raise one of the subclasses: they say whose fault it is")
        super().__init__(what)
        self.hint = self.default_hint if hint is None else hint


class StoreError(CheckpointError):
    """The store failed a request in a way that asking again does not mend."""

    default_hint = "Look at the store's own logs, then try again."


class StoreUnreachable(StoreError):
    """Nothing answers at the store's address, or it did not answer in time."""

    default_hint = "Check the endpoint (AWS_ENDPOINT_URL, endpoint_url) and the network to it."


class StoreRefused(StoreError):
    """The store refuses the credentials, or they do not allow what was asked."""

    default_hint = (
        "Check the key and secret (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and that they may "
        "read, write, list and delete under this URL."
    )


class NoSuchBucket(StoreError):
    """The bucket, or the folder that must hold the store, does not exist."""

    default_hint = "Create the bucket, or correct the URL."


class KeyExists(StoreError):
    """A create-only put found the key taken: somebody else was first."""

    default_hint = "Read the key: what it holds was there first and stays."


class KeyMissing(StoreError):
    """The key is not in the store."""

    default_hint = "See what is under checkpoints/commits/ in the run's folder."


class FormatError(CheckpointError):
    """A record of a checkpoint is cut short, altered, or written by a newer version."""

    default_hint = (
        "The checkpoint cannot be used: an older one can. `perdure ckpt verify URL` checks all."
    )


class IntegrityError(CheckpointError):
    """Stored bytes do not match their checksum. Names the object and, where known, the block."""

    default_hint = (
        "The checkpoint cannot be used: an older one can. `perdure ckpt verify URL` checks all."
    )

    def __init__(self, what: str, *, key: str, block: int | None = None) -> None:
        super().__init__(what)
        self.key = key
        self.block = block


class StateError(CheckpointError):
    """The state given does not fit the checkpoint, or holds what cannot be stored."""

    default_hint = "Change the state that is given to save or restore as the message says."


class ForkError(CheckpointError):
    """A client made in one process was used in a forked child, where it would never return."""

    default_hint = "Make the store or the Checkpointer in the process that uses it."
