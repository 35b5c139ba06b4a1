"""From a command line to a running job. The only folder that imports ray."""
