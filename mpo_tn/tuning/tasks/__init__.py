"""Tasks to tune on: the nine of GLUE and folders of plain text, and their batches."""
