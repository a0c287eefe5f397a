"""The refinery: named steps that clean a file of instruction data, with counts of all they do."""
