"""One script a claim; each measures perdure beside a peer in the same run."""
