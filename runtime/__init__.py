"""The executor: it decides in `core`, acts in `driver` and `agent`."""
