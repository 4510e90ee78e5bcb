"""Products of linear layers on the CPU, by the format of the weight and the level of the CPU."""
