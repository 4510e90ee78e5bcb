"""Tools: what requests say of them, and the calls and thoughts in what models write."""
