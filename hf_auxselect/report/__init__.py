"""The selection report: what was chosen, what was expected of the alternatives, and why."""
