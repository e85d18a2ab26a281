"""The paper: criteria, the path, what a unit is, and how it is scored."""
