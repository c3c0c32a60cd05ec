"""Free-running generation and, later, the measures of expressivity."""
