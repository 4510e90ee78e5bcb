"""One model over several processes: how the first rank leads the others."""
