"""The paper's printed numbers, and our rows beside them."""
