"""From signals to a verdict. Imports neither ray nor runtime. Empty until the health daemon comes."""
