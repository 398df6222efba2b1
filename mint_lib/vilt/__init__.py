"""The ViLT teacher: what it reads and what it is."""
