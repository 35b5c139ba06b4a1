"""A world for the core: clock, cluster, faults, checks."""
