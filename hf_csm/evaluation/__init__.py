"""Free-running generation and measures of expressivity."""
