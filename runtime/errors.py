"""The error tree. An error says what happened, whose fault it is and what to do next.

PerdureError                  never raised itself
  UsageError        exit 2    the user's: an option, a spec, a script that cannot run
  StoreProblem      exit 2    the store's: unreachable, refused, no such bucket, not shared
  RunProblem        exit 2    the run's: unknown, still alive, altered
  NoPlace           exit 75   the cluster's: nothing to place the job on in time
  InvariantBroken   exit 2    perdure's own: the core would have done what it must never do
  WireError         (caught)  a peer's: a broken or unauthenticated connection; never ends a job
"""


class PerdureError(Exception):
    """`str(error)` is what happened and whose fault it is; `hint` is what to do next."""

    exit_code = 2

    def __init__(self, what: str, *, hint: str) -> None:
        if type(self) is PerdureError:
            raise TypeError("raise one of the subclasses: they say whose fault it is")
        super().__init__(what)
        self.hint = hint


class UsageError(PerdureError):
    """The command line, the spec or the script cannot run as given."""


class StoreProblem(PerdureError):
    """The store cannot be used: unreachable, refused, missing, or not shared by the nodes."""


class RunProblem(PerdureError):
    """The run named is unknown, still alive, or its folder was altered."""


class NoPlace(PerdureError):
    """Not enough nodes within `place_timeout_s`."""

    exit_code = 75


class InvariantBroken(PerdureError):
    """The core was about to break its own law: stopping is safer than going on."""


class WireError(PerdureError):
    """A connection broke, or its peer could not prove that it knows the run's token."""
