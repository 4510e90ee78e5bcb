"""One model over several ranks: what each of them holds, and how they sum."""
