"""The data gate: what cases and pairs must satisfy before anything is trained on them, and the report that says so."""
