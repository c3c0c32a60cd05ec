"""The one exception for what a user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: prints as two lines, what is wrong and what to do.

    Args:
        problem: one line that names the offending thing and its value.
        remedy: one line that says what to do about it.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self):  # survives the trip from a worker process
        return type(self), (self.problem, self.remedy)
