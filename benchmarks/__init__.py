"""Benchmarks: each measures perdure beside a peer, in the same run on the same machine."""
