"""Products with weights that have scales by groups of inputs: int4, and int8 of published files."""
