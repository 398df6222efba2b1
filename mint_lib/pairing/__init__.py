"""How a ranking becomes preference pairs: drawn by a policy, checked as the student reads them, and counted."""
