"""What explains a run: its plan, an estimate of its memory, and a report on what it has written."""
