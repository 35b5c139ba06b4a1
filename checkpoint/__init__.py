"""From tensors to a committed manifest and back. Imports neither ray nor runtime."""
